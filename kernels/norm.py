"""RMSNorm and LayerNorm of rows.

With few rows the projection that follows is bound by reading weights, so RMSNorm is folded into
it at no cost and this kernel is not used (see `planner.kernels.mlp`). With many rows the
projection is bound by the tensor cores, which would wait for the scaling: normalising once, here,
costs one read and one write of the activations (a few percent of the projection).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from planner.kernels.launch import launch
from planner.kernels.records import Norm

__all__ = ["normalize", "normalize_kernel"]


@triton.jit(do_not_specialize=["rows"])
def normalize_kernel(
    x,  # [rows, width]
    weight,  # [width]
    bias,  # [width] or None
    out,  # [rows, width]
    rows,
    width,
    eps,
    offset,
    LAYER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = (x - mean) * rsqrt(mean((x - mean)^2) + eps) * (offset + weight) + bias, row by row.

    The mean is 0 for RMSNorm. bf16, fp16 or fp32 in and out, float32 inside. A program holds
    BLOCK_M whole rows (BLOCK_N >= width). Source: arXiv 1910.07467 eq. 4, 1607.06450 eq. 4.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = column < width
    mask = (row < rows)[:, None] & inside[None, :]
    address = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + address, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    if LAYER:
        mean = tl.sum(value, axis=1) / width
        value = tl.where(inside[None, :], value - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)  # [BLOCK_M]
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    value = value * inverse[:, None] * gain[None, :]
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + address, value.to(out.dtype.element_ty), mask=mask)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """The norm of x over its last axis; same shape and dtype. Twin: `naive.normalize`."""
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    block_m = max(1, min(8, 2048 // block))
    launch(
        normalize_kernel,
        (triton.cdiv(rows, block_m),),
        {
            "x": x,
            "weight": norm.weight,
            "bias": norm.bias,
            "out": out,
            "rows": rows,
            "width": width,
            "eps": norm.eps,
            "offset": norm.offset,
            "LAYER": norm.kind == "layer",
            "BLOCK_M": block_m,
            "BLOCK_N": block,
        },
        warps=8 if block >= 4096 else 4,
    )
    return out
