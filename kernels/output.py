"""The projection back to the hidden size, read along surviving input features, onto the residual.

One kernel ends both blocks: attention's output projection (a unit is the query heads of one KV
group) and the MLP's down projection (a unit is eight neurons).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from planner.kernels.launch import launch, target_for
from planner.kernels.primitives import tile_order
from planner.kernels.records import Survivors
from planner.kernels.tiles import Tile, matmul_tile

__all__ = ["project_out", "project_out_kernel"]


@triton.jit(do_not_specialize=["rows", "slots"])
def project_out_kernel(
    a,  # [samples, rows, slots * WIDTH]
    weight,  # [features_out, features_in]
    bias,  # [features_out] or None
    residual,  # [samples, rows, features_out] or None
    units,  # [samples, slots] int32
    counts,  # [samples] int32
    out,  # [samples, rows, features_out]
    rows,
    slots,
    features_in,
    features_out,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """out = residual + bias + sum over virtual columns j of a[:, j] weight[:, f(j)].

    f(j) is the feature of virtual column j; VECTOR, a power of two that divides WIDTH, is how many
    features in a row are contiguous and aligned. bf16, fp16 or fp32, accumulated in float32;
    columns of the weight that do not survive are never read. A sample without survivors gets
    residual + bias.
    """
    sample = tl.program_id(1)
    survivors = tl.load(counts + sample) * WIDTH
    row_tile, column_tile = tile_order(
        tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(features_out, BLOCK_N), GROUP_ROWS
    )
    units += sample * slots
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end read the last one; they are not stored.
    a_row = a + (sample * rows + tl.minimum(row, rows - 1)).to(tl.int64)[:, None] * (slots * WIDTH)
    weight_row = weight + tl.minimum(column, features_out - 1).to(tl.int64)[:, None] * features_in
    address = (sample * rows + row).to(tl.int64)[:, None] * features_out + column[None, :]
    mask = (row < rows)[:, None] & (column < features_out)[None, :]
    # The sum starts from the residual: added at the end, it would need registers beside the sum.
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if residual is not None:
        accumulator += tl.load(residual + address, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + column, mask=column < features_out, other=0.0)
        accumulator += shift.to(tl.float32)[None, :]
    for start in range(0, survivors, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < survivors
        unit = tl.load(units + k // WIDTH, mask=inside, other=0)
        # Written out and not called: a hint on what a function returns is lost when it is inlined.
        feature = tl.where(inside, unit * WIDTH + k % WIDTH, 0)
        feature = tl.max_contiguous(tl.multiple_of(feature, VECTOR), VECTOR)
        p = tl.load(a_row + k[None, :], mask=inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(weight_row + feature[None, :], mask=inside[None, :], other=0.0)
        accumulator = tl.dot(p, tl.trans(w), accumulator, input_precision="ieee")
    tl.store(out + address, accumulator.to(out.dtype.element_ty), mask=mask)


def project_out(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    survivors: Survivors,
    width: int,
    tile: Tile | None = None,
) -> Tensor:
    """``residual + bias + a @ weight[:, surviving].T``. Twin: `naive.project_out`.

    Args:
        a: (samples, rows, slots * width), packed to the left.
        weight: (features_out, features_in).
        bias: (features_out,) or None.
        residual: (samples, rows, features_out) or None for zero.
        survivors: surviving units of the input features.
        width: input features per unit.
        tile: for tests; by default `tiles.matmul_tile` chooses.

    Returns:
        (samples, rows, features_out).
    """
    samples, rows, columns = a.shape
    features_out, features_in = weight.shape
    tile = tile or matmul_tile(
        rows,
        features_out,
        columns,
        target_for(a),
        samples=samples,
        element_bytes=a.element_size(),
        accumulators=128,
    )
    out = a.new_empty(samples, rows, features_out)
    launch(
        project_out_kernel,
        (triton.cdiv(rows, tile.block_m) * triton.cdiv(features_out, tile.block_n), samples),
        {
            "a": a,
            "weight": weight,
            "bias": bias,
            "residual": residual,
            "units": survivors.units,
            "counts": survivors.counts,
            "out": out,
            "rows": rows,
            "slots": survivors.slots,
            "features_in": features_in,
            "features_out": features_out,
            "WIDTH": width,
            "VECTOR": vector(width),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_ROWS": tile.group_rows,
        },
        warps=tile.warps,
        stages=pipeline(tile.stages),
    )
    return out


def vector(width: int) -> int:
    """The largest power of two up to 8 that divides a unit's width: features in one vector."""
    return min(width & -width, 8)


def pipeline(stages: int) -> int:
    """Pipeline depth that keeps `stages` weight tiles in flight.

    The index of a weight is loaded before the weight, so the compiler halves the depth it is given.
    """
    return 2 * stages - 1
