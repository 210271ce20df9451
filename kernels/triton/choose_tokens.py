"""The best tokens of each sample, found bit by bit in registers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import override

from planner.kernels.ops.choose_tokens import ChooseTokens
from planner.kernels.triton.kernel import Case, Kernel, require
from planner.kernels.triton.tiles import power_of_two


@triton.jit
def order_of(score):
    """Integers in the order of float32 scores (negative floats count downwards in their bits)."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["tokens"])
def choose_tokens_kernel(
    scores,  # [batch, tokens] float32
    eligible,  # [batch, tokens] int8
    counts,  # [batch] int32
    chosen,  # [batch, tokens] int8
    tokens,
    BLOCK_T: tl.constexpr,
):
    """chosen = the `counts` best eligible tokens; of equal scores the earlier token wins.

    The threshold is found bit by bit from the top, so the choice is exact and takes 32 passes over
    registers. One program per sample.
    """
    sample = tl.program_id(0)
    token = tl.arange(0, BLOCK_T)
    real = token < tokens
    cell = sample.to(tl.int64) * tokens + token
    competes = tl.load(eligible + cell, mask=real, other=0) != 0
    # Adding 0 makes -0 the 0 that it equals.
    order = order_of(tl.load(scores + cell, mask=competes, other=0.0) + 0.0)
    wanted = tl.load(counts + sample)
    # The largest threshold that at least `wanted` candidates reach. The sign bit comes first.
    reached = tl.sum((competes & (order >= 0)).to(tl.int32), axis=0) >= wanted
    threshold = tl.where(reached, 0, -2147483648)
    for bit in range(31):
        higher = threshold + (1 << (30 - bit))
        reached = tl.sum((competes & (order >= higher)).to(tl.int32), axis=0) >= wanted
        threshold = tl.where(reached, higher, threshold)
    above = competes & (order > threshold)
    level = competes & (order == threshold)
    free = wanted - tl.sum(above.to(tl.int32), axis=0)
    kept = above | (level & (tl.cumsum(level.to(tl.int32), axis=0) <= free))
    tl.store(chosen + cell, kept.to(tl.int8), mask=real)


class ChooseTokensKernel(Kernel):
    """Launches `choose_tokens_kernel`."""

    function = choose_tokens_kernel
    computes = ChooseTokens
    multiplies = False
    dtypes = (torch.float32,)

    @override
    def __call__(self, inputs: ChooseTokens) -> Tensor:
        scores, eligible = inputs.scores, inputs.eligible
        batch, tokens = scores.shape
        shapes = eligible.shape, scores.shape
        require(shapes[0] == shapes[1], f"{shapes[0]} candidates, {shapes[1]} scores.")
        chosen = torch.empty(batch, tokens, dtype=torch.int8, device=scores.device)
        block = power_of_two(tokens)
        arguments = {
            "scores": scores.float().contiguous(),
            "eligible": eligible.to(torch.int8).contiguous(),
            "counts": inputs.counts.to(torch.int32),
            "chosen": chosen,
            "tokens": tokens,
            "BLOCK_T": block,
        }
        self.start((batch,), arguments, warps=4 if block < 1024 else 8)
        return chosen.bool()

    @override
    def cases(self) -> Iterator[Case]:
        for tokens in (1, 37, 64):
            # Few distinct values, negative ones among them, so that many scores are equal.
            scores = torch.randint(-3, 4, (4, tokens)).float()
            scores[torch.rand(scores.shape) < 0.1] = -torch.inf
            scores[torch.rand(scores.shape) < 0.1] = -0.0
            eligible = torch.rand(4, tokens) < 0.7
            counts = torch.tensor([0, 1, tokens // 3, tokens + 1])
            yield Case(f"{tokens} tokens", ChooseTokens(scores, eligible, counts))


choose_tokens = ChooseTokensKernel()
