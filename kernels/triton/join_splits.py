"""The parts that attention over split keys left, joined exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import override

from planner.kernels.survivors import Survivors
from planner.kernels.triton.kernel import Case, Kernel
from planner.kernels.triton.tiles import power_of_two


@triton.jit(do_not_specialize=["slots", "splits"])
def join_splits_kernel(
    partial,  # [batch, slots * GROUP, splits, HEAD_DIM] float32
    weight,  # [batch, slots * GROUP, splits] float32
    counts,  # [plans] int32
    out,  # [batch, slots * GROUP, HEAD_DIM]
    slots,
    splits,
    plan_stride,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out = sum over splits of 2^(weight - max) partial / sum over splits of 2^(weight - max).

    A head whose splits are all empty gets 0; heads of slots beyond a plan's count get nothing.
    """
    head = tl.program_id(0)
    sample = tl.program_id(1)
    if head >= tl.load(counts + sample * plan_stride) * GROUP:
        return
    row = (sample * slots).to(tl.int64) * GROUP + head
    split = tl.arange(0, BLOCK_S)
    lane = tl.arange(0, BLOCK_D)
    real_split = split < splits
    real_lane = lane < HEAD_DIM
    log = tl.load(weight + row * splits + split, mask=real_split, other=float("-inf"))
    highest = tl.max(log, axis=0)
    share = tl.exp2(log - tl.where(highest == float("-inf"), 0.0, highest))  # [BLOCK_S]
    cell = (row * splits + split)[:, None] * HEAD_DIM + lane[None, :]
    part = tl.load(partial + cell, mask=real_split[:, None] & real_lane[None, :], other=0.0)
    total = tl.sum(share, axis=0)
    result = tl.sum(part * share[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * HEAD_DIM + lane, result.to(out.dtype.element_ty), mask=real_lane)


@dataclass(frozen=True, eq=False)
class Splits:
    """Softmax sums over disjoint keys, to be joined: (batch, heads, head_dim)."""

    partial: Tensor  # (batch, heads, splits, head_dim) float32: each split's attention
    # (batch, heads, splits) float32: base-2 logarithms of its softmax sums, -inf for a split
    # without keys.
    weight: Tensor
    survivors: Survivors  # surviving units of heads

    def twin(self) -> Tensor:
        """A softmax in base 2 over the splits."""
        share = torch.softmax(self.weight * 0.6931471805599453, dim=-1).nan_to_num(0.0)
        out = (self.partial * share[..., None]).sum(dim=2)
        width = out.shape[1] // self.survivors.slots
        for sample in range(len(out)):
            plan = self.survivors.plan_of(sample)
            out[sample, int(self.survivors.counts[plan]) * width :] = torch.nan
        return out


class JoinSplitsKernel(Kernel):
    """The second step of `attend` for a single token. Source: Flash-Decoding (Dao et al., 2023)."""

    function = join_splits_kernel
    of_plan = frozenset({"slots", "plan_stride"})
    multiplies = False
    dtypes = (torch.float32,)

    @override
    def __call__(self, inputs: Splits, dtype: torch.dtype = torch.float32) -> Tensor:
        partial, survivors = inputs.partial, inputs.survivors
        batch, heads, splits, head_dim = partial.shape
        out = partial.new_empty((batch, heads, head_dim), dtype=dtype)
        constants = {
            "HEAD_DIM": head_dim,
            "GROUP": heads // survivors.slots,
            "BLOCK_D": power_of_two(head_dim),
            "BLOCK_S": power_of_two(splits),
        }
        tensors = {"partial": partial, "weight": inputs.weight, "out": out}
        arguments = tensors | {"splits": splits} | constants
        self.start((heads, batch), arguments, survivors=survivors)
        return out

    @override
    def cases(self) -> Iterator[Case]:
        for splits, plans in ((1, [[0, 2]]), (5, [[0], [], [1, 2]])):
            weight = torch.randn(3, 6, splits)
            weight[:, ::2, :2] = -torch.inf
            inputs = Splits(torch.randn(3, 6, splits, 20), weight, Survivors.of(plans, 3))
            yield Case(f"{splits} splits, {len(plans)} plans", inputs)


join_splits = JoinSplitsKernel()
