"""A linear layer over surviving input features: columns of its weight, read in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import override

from planner.kernels.ops.project_columns import ProjectColumns
from planner.kernels.survivors import Survivors
from planner.kernels.triton.kernel import Case, Kernel, require, strides
from planner.kernels.triton.launch import target_for
from planner.kernels.triton.primitives import tile_order
from planner.kernels.triton.tiles import Product, Tile, matmul_tile


@triton.jit(do_not_specialize=["rows", "slots"])
def project_columns_kernel(
    a,  # [samples, rows, slots * WIDTH]
    weight,  # [features_out, features_in], strided
    bias,  # [features_out] or None
    units,  # [samples, slots] int32
    counts,  # [samples] int32
    out,  # [samples, rows, features_out]
    rows,
    slots,
    features_out,
    weight_row,  # strides, in elements
    weight_column,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """out = bias + sum over virtual columns j of a[:, j] weight[:, f(j)].

    f(j) is the feature of virtual column j; VECTOR, a power of two that divides WIDTH, is how many
    features in a row are contiguous and aligned. bf16, fp16 or fp32, accumulated in float32;
    columns of the weight that do not survive are never read. A sample without survivors gets the
    bias.
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
    last = tl.minimum(column, features_out - 1).to(tl.int64)
    weight_start = weight + last[:, None] * weight_row
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
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
        weight_tile = weight_start + feature[None, :] * weight_column
        p = tl.load(a_row + k[None, :], mask=inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(weight_tile, mask=inside[None, :], other=0.0)
        accumulator = tl.dot(p, tl.trans(w), accumulator, input_precision="ieee")
    address = (sample * rows + row).to(tl.int64)[:, None] * features_out + column[None, :]
    mask = (row < rows)[:, None] & (column < features_out)[None, :]
    tl.store(out + address, accumulator.to(out.dtype.element_ty), mask=mask)


class ProjectColumnsKernel(Kernel):
    """Launches `project_columns_kernel`."""

    function = project_columns_kernel
    computes = ProjectColumns
    of_model = frozenset({"features_out", "weight_row", "weight_column"})
    of_plan = frozenset({"slots"})
    plan_axis = 1
    indexed_by = "units"

    @override
    def __call__(self, inputs: ProjectColumns, tile: Tile | None = None) -> Tensor:
        a, weight, survivors = inputs.a, inputs.weight, inputs.survivors
        columns, plans = survivors.slots * survivors.width, survivors.plans
        features_out = weight.shape[0]
        require(a.shape[-1] == columns, f"{a.shape[-1]} features where survivors have {columns}.")
        require(weight.shape[1] >= columns, f"{columns} survivors of {weight.shape[1]} features.")
        require(a.dtype == weight.dtype, f"{a.dtype} features meet a weight in {weight.dtype}.")
        out = inputs.empty()
        rows = out.numel() // features_out // plans
        every = {"accumulators": 128, "whole": weight.shape[1]}
        size, target = a.element_size(), target_for(a)
        product = Product(rows, features_out, columns, target, plans, size, **every)
        tile = tile or matmul_tile(product)
        tensors = {"a": a.contiguous(), "weight": weight, "bias": inputs.bias, "out": out}
        sizes = {"rows": rows, "features_out": features_out}
        self.start(
            (triton.cdiv(rows, tile.block_m) * triton.cdiv(features_out, tile.block_n), plans),
            tensors | sizes | strides("weight", weight, "row", "column"),
            warps=tile.warps,
            # The index of a weight is loaded before the weight, so the compiler halves the depth of
            # the pipeline that it is given.
            stages=2 * tile.stages - 1,
            survivors=survivors,
            product=product,
            tile=tile,
        )
        return out

    @override
    def cases(self) -> Iterator[Case]:
        small = Tile(block_m=16, block_n=16, block_k=32, warps=4, stages=2, group_rows=2)
        for width in (1, 8, 24):
            for plans in ([[0, 3, 4]], [[0, 3, 4], [], [2]]):
                kept = [[u * width + i for u in plan for i in range(width)] for plan in plans]
                a = torch.randn(3, 21, 5 * width)
                for sample in range(3):
                    count = len(kept[min(sample, len(kept) - 1)])
                    a[sample, :, count:] = torch.nan
                weight = torch.randn(37, 5 * width) / (3 * width) ** 0.5
                weight[:, width : 2 * width] = torch.nan  # survives nowhere
                stored = weight.t().contiguous().t() if width == 24 else weight
                bias = torch.randn(37) if width < 24 else None
                survivors = Survivors.of(kept, 5 * width, width)
                inputs = ProjectColumns(a, stored, bias, survivors)
                yield Case(f"width {width}, {len(plans)} plans", inputs, {"tile": small})


project_columns = ProjectColumnsKernel()
