"""The tokens that are left, copied side by side."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import override

from planner.kernels.ops.gather_tokens import GatherTokens
from planner.kernels.triton.kernel import Case, Kernel, require
from planner.kernels.triton.launch import Launch
from planner.kernels.triton.tiles import Target, power_of_two


@triton.jit(do_not_specialize=["tokens", "picked"])
def gather_tokens_kernel(
    x,  # [batch, tokens, width]
    index,  # [batch, picked] int64, or one row for all
    out,  # [batch, picked, width]
    tokens,
    picked,
    width,
    index_stride,
    BLOCK: tl.constexpr,
):
    """out[t] = x[index[t]], exactly."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // picked
    source = tl.load(index + sample * index_stride + row % picked)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = (sample * tokens + source) * width
    value = tl.load(x + start + column, mask=column < width, other=0.0)
    tl.store(out + row * width + column, value, mask=column < width)


class GatherTokensKernel(Kernel):
    """Launches `gather_tokens_kernel`."""

    function = gather_tokens_kernel
    computes = GatherTokens
    of_model = frozenset({"width"})
    multiplies = False

    @override
    def __call__(self, inputs: GatherTokens) -> Tensor:
        x, index = inputs.x, inputs.index
        batch, tokens, width = x.shape
        rows, picked = index.shape
        require(rows in (1, batch), f"{rows} rows of places do not fit {batch} samples.")
        out = inputs.empty()
        block = min(1024, power_of_two(width))
        tensors = {"x": x.contiguous(), "index": index.contiguous(), "out": out}
        sizes = {"tokens": tokens, "picked": picked, "width": width}
        placed = {"index_stride": picked if rows > 1 else 0, "BLOCK": block}
        grid = (batch * picked, triton.cdiv(width, block))
        self.start(grid, tensors | sizes | placed)
        return out

    @override
    def seconds(self, launch: Launch, target: Target) -> float:
        return target.roofline(0, 2 * launch.arguments["out"].nbytes)

    @override
    def cases(self) -> Iterator[Case]:
        for rows in (1, 2):
            inputs = GatherTokens(torch.randn(2, 9, 1100), torch.randint(9, (rows, 4)))
            yield Case(f"{rows} rows of places", inputs)


gather_tokens = GatherTokensKernel()
