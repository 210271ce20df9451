"""A linear layer's output features that survive: rows of its weight, read in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from planner.kernels.ops.project_rows import naive_project_rows
from planner.kernels.survivors import Survivors
from planner.kernels.triton.kernel import Case, Kernel, product_seconds, require
from planner.kernels.triton.launch import Launch, target_for
from planner.kernels.triton.primitives import surviving_features, tile_order
from planner.kernels.triton.tiles import Target, Tile, matmul_tile, vector

__all__ = ["project_rows"]


@triton.jit(do_not_specialize=["rows", "slots"])
def project_rows_kernel(
    x,  # [samples, rows, depth]
    weight,  # [features, depth], strided
    bias,  # [features] or None
    units,  # [samples, slots] int32
    counts,  # [samples] int32
    out,  # [samples, rows, columns]
    rows,
    depth,
    slots,
    columns,
    weight_row,  # strides, in elements
    weight_column,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """out[:, p(j)] = x @ weight[f(j)] + bias[f(j)], f(j) = feature of virtual column j.

    p(j) is j where PACKED, otherwise f(j). Columns at or beyond ``counts * WIDTH`` are not
    computed, and what nothing survives for is not written. VECTOR, a power of two that divides
    WIDTH, is how many features in a row are contiguous and aligned. A sample here is a plan: with
    one plan for the batch, rows are batch * tokens. bf16, fp16 or fp32, accumulated in float32.
    """
    sample = tl.program_id(1)
    survivors = tl.load(counts + sample) * WIDTH
    row_tile, column_tile = tile_order(
        tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(slots * WIDTH, BLOCK_N), GROUP_ROWS
    )
    if column_tile * BLOCK_N >= survivors:
        return
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows beyond the end read the last one; they are not stored.
    x_row = x + (sample * rows + tl.minimum(row, rows - 1)).to(tl.int64) * depth
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = column < survivors
    feature = surviving_features(units + sample * slots, column, kept, WIDTH)
    k = tl.arange(0, BLOCK_K)
    x_tile = x_row[:, None] + k[None, :]  # [BLOCK_M, BLOCK_K]
    weight_row_start = weight + feature.to(tl.int64) * weight_row
    weight_tile = weight_row_start[:, None] + k[None, :] * weight_column  # [BLOCK_N, BLOCK_K]

    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_DEPTH:
            a = tl.load(x_tile + start)
            w = tl.load(weight_tile + start * weight_column)
        else:
            inside = ((start + k) < depth)[None, :]
            a = tl.load(x_tile + start, mask=inside, other=0.0)
            w = tl.load(weight_tile + start * weight_column, mask=inside, other=0.0)
        accumulator = tl.dot(a, tl.trans(w), accumulator, input_precision="ieee")
    if bias is not None:
        accumulator += tl.load(bias + feature, mask=kept, other=0.0).to(tl.float32)[None, :]

    place = column
    if not PACKED:
        place = tl.max_contiguous(tl.multiple_of(feature, VECTOR), VECTOR)
    address = (sample * rows + row).to(tl.int64)[:, None] * columns + place[None, :]
    mask = (row < rows)[:, None] & kept[None, :]
    tl.store(out + address, accumulator.to(out.dtype.element_ty), mask=mask)


class ProjectRows(Kernel):
    """See `planner.kernels.ops.project_rows`."""

    function = project_rows_kernel
    of_model = frozenset({"depth", "weight_row", "weight_column"})
    of_plan = frozenset({"slots", "columns"})
    plan_axis = 1
    twin = staticmethod(naive_project_rows)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        survivors: Survivors,
        packed: bool,
        tile: Tile | None = None,
    ) -> Tensor:
        """Arguments and result as those of the op; `tile` is for tests."""
        (features, depth), plans = weight.shape, survivors.plans
        require(x.shape[-1] == depth, f"{x.shape[-1]} features meet a weight for {depth}.")
        require(x.dtype == weight.dtype, f"{x.dtype} features meet a weight in {weight.dtype}.")
        kept = survivors.slots * survivors.width
        columns = kept if packed else features
        shape = (*x.shape[:-1], columns)
        # Scattered features lie among those of units that do not survive, which are 0.
        out = x.new_empty(shape) if packed else x.new_zeros(shape)
        rows = x.numel() // depth // plans
        tile = tile or matmul_tile(
            rows, kept, depth, target_for(x), samples=plans, element_bytes=x.element_size()
        )
        self.start(
            (triton.cdiv(rows, tile.block_m) * triton.cdiv(kept, tile.block_n), plans),
            {
                "x": x.contiguous(),
                "weight": weight,
                "bias": bias,
                "units": survivors.units,
                "counts": survivors.counts,
                "out": out,
                "rows": rows,
                "depth": depth,
                "slots": survivors.slots,
                "columns": columns,
                "weight_row": weight.stride(0),
                "weight_column": weight.stride(1),
                "WIDTH": survivors.width,
                "PACKED": packed,
                "VECTOR": vector(survivors.width),
                "EVEN_DEPTH": depth % tile.block_k == 0,
                **tile.blocks,
            },
            warps=tile.warps,
            stages=tile.stages,
            survivors=survivors,
        )
        return out

    def seconds(self, launch: Launch, target: Target) -> float:
        """Of a product with the columns there is room for."""
        given = launch.arguments
        columns = given["slots"] * given["WIDTH"]
        return product_seconds(launch, target, given["rows"], columns, given["depth"])

    def cases(self) -> Iterator[Case]:
        """One plan and three, each packed and scattered, on weights of both layouts."""
        small = Tile(block_m=16, block_n=16, block_k=32, warps=4, stages=2, group_rows=2)
        for width, depth in ((1, 37), (8, 64), (24, 40)):
            for plans in ([[0, 1, 4]], [[0, 3], [], [2]]):
                dead = sorted(set(range(5)) - {unit for plan in plans for unit in plan})
                weight = torch.randn(5 * width, depth) / depth**0.5
                weight.view(5, width, depth)[dead] = torch.nan  # what survives nowhere is not read
                stored = weight.t().contiguous().t() if width == 24 else weight
                kept = [[u * width + i for u in plan for i in range(width)] for plan in plans]
                survivors = Survivors.of(kept, 5 * width, width)
                for packed in (True, False):
                    inputs = {
                        "x": torch.randn(3, 7, depth),
                        "weight": stored,
                        "bias": None if width == 1 else torch.randn(5 * width),
                        "survivors": survivors,
                        "packed": packed,
                    }
                    name = f"width {width}, {len(plans)} plans, {'packed' * packed}"
                    yield Case(name, inputs, {"tile": small})


project_rows = ProjectRows()
