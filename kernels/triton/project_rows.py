"""Output features that survive: rows of a linear's weight, or of gate and up of an MLP.

Survivors are tiled as one run of virtual columns through the index list: only the last tile of a
plan has a tail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import override

from planner.kernels.ops.project_rows import ACTIVATIONS, ProjectRows
from planner.kernels.survivors import Survivors
from planner.kernels.triton.kernel import Case, Kernel, require, strides
from planner.kernels.triton.launch import target_for
from planner.kernels.triton.primitives import activate, surviving_features, tile_order
from planner.kernels.triton.tiles import Product, Tile, matmul_tile


@triton.jit(do_not_specialize=["rows", "slots"])
def project_rows_kernel(
    x,  # [samples, rows, depth]
    weight,  # [features, depth], strided
    gate_weight,  # [features, depth] or None; strided as weight
    bias,  # [features] or None
    gate_bias,  # [features] or None
    units,  # [samples, slots] int32
    counts,  # [samples] int32
    lanes,  # [samples, slots] int32 or None
    out,  # [samples, rows, columns]
    rows,
    depth,
    slots,
    columns,
    weight_row,  # strides, in elements
    weight_column,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """out[:, p(j)] = act(x @ gate[f(j)]) * (x @ weight[f(j)]), f(j) = feature of virtual column j.

    p(j) is j where PACKED, otherwise f(j). Columns at or beyond ``counts * WIDTH`` are neither
    computed nor written; features that do not survive inside a unit give 0. VECTOR, a power of two
    that divides WIDTH, is how many features in a row are contiguous and aligned. A sample here is a
    plan: with one for the batch, rows are batch * tokens. bf16, fp16 or fp32, accumulated in
    float32. Rows of gate and weight are interleaved into one weight tile, so that both factors of a
    feature meet in one thread's registers.
    """
    PARTS: tl.constexpr = 1 if gate_weight is None else 2
    sample = tl.program_id(1)
    survivors = tl.load(counts + sample) * WIDTH
    row_tile, column_tile = tile_order(
        tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(slots * WIDTH, BLOCK_N), GROUP_ROWS
    )
    if column_tile * BLOCK_N >= survivors:
        return
    units += sample * slots
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows beyond the end read the last one; they are not stored.
    x_row = x + (sample * rows + tl.minimum(row, rows - 1)).to(tl.int64) * depth
    part = tl.arange(0, PARTS * BLOCK_N)
    column = column_tile * BLOCK_N + part // PARTS
    feature = surviving_features(units, column, column < survivors, WIDTH)
    if PARTS == 2:
        # Alignment does not survive the choice between pointers unless it is stated.
        weight_start = tl.multiple_of(tl.where(part % 2 == 0, gate_weight, weight), 16)
    else:
        weight_start = weight
    weight_start += feature.to(tl.int64) * weight_row
    k = tl.arange(0, BLOCK_K)
    x_tile = x_row[:, None] + k[None, :]  # [BLOCK_M, BLOCK_K]
    weight_tile = weight_start[:, None] + k[None, :] * weight_column  # [PARTS * BLOCK_N, BLOCK_K]

    accumulator = tl.zeros([BLOCK_M, PARTS * BLOCK_N], dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_DEPTH:
            a = tl.load(x_tile + start)
            w = tl.load(weight_tile + start * weight_column)
        else:
            inside = ((start + k) < depth)[None, :]
            a = tl.load(x_tile + start, mask=inside, other=0.0)
            w = tl.load(weight_tile + start * weight_column, mask=inside, other=0.0)
        accumulator = tl.dot(a, tl.trans(w), accumulator, input_precision="ieee")

    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = column < survivors
    feature = surviving_features(units, column, kept, WIDTH)
    if PARTS == 2:
        gate, linear = tl.split(tl.reshape(accumulator, [BLOCK_M, BLOCK_N, 2]))
        if gate_bias is not None:
            gate += tl.load(gate_bias + feature).to(tl.float32)[None, :]
        if bias is not None:
            linear += tl.load(bias + feature).to(tl.float32)[None, :]
        result = activate(gate, ACTIVATION) * linear  # [BLOCK_M, BLOCK_N]
    else:
        linear = accumulator
        if bias is not None:
            linear += tl.load(bias + feature).to(tl.float32)[None, :]
        result = activate(linear, ACTIVATION)
    if lanes is not None:
        bits = tl.load(lanes + sample * slots + column // WIDTH, mask=kept, other=0)
        result = tl.where(((bits >> (column % WIDTH)) & 1)[None, :] != 0, result, 0.0)
    place = column
    if not PACKED:
        place = tl.max_contiguous(tl.multiple_of(feature, VECTOR), VECTOR)
    address = (sample * rows + row).to(tl.int64)[:, None] * columns + place[None, :]
    mask = (row < rows)[:, None] & kept[None, :]
    tl.store(out + address, result.to(out.dtype.element_ty), mask=mask)


class ProjectRowsKernel(Kernel):
    """Launches `project_rows_kernel`."""

    function = project_rows_kernel
    computes = ProjectRows
    of_model = frozenset({"depth", "weight_row", "weight_column"})
    of_plan = frozenset({"slots", "columns"})
    plan_axis = 1

    @override
    def __call__(self, inputs: ProjectRows, tile: Tile | None = None) -> Tensor:
        x, weight, gate, survivors = inputs.x, inputs.weight, inputs.gate, inputs.survivors
        (features, depth), plans = weight.shape, survivors.plans
        kept, known = survivors.slots * survivors.width, ("", *ACTIVATIONS)
        require(x.shape[-1] == depth, f"{x.shape[-1]} features meet a weight for {depth}.")
        require(x.dtype == weight.dtype, f"{x.dtype} features meet a weight in {weight.dtype}.")
        require(inputs.activation in known, f"no kernel has activation '{inputs.activation}'.")
        require(kept <= features, f"{kept} survivors of {features} features.")
        if gate is not None:
            require(gate.shape == weight.shape, f"a gate of shape {tuple(gate.shape)}.")
            if gate.stride() != weight.stride():
                gate, weight = gate.contiguous(), weight.contiguous()
        # Scattered features lie among those of units that do not survive, which are 0.
        out = inputs.empty() if inputs.packed else torch.zeros_like(inputs.empty())
        if kept == 0:
            return out
        rows = x.numel() // depth // plans
        parts = 1 if gate is None else 2
        size = x.element_size()
        product = Product(rows, kept, depth, target_for(x), plans, size, parts, whole=features)
        tile = tile or matmul_tile(product)
        tensors = {"x": x.contiguous(), "weight": weight, "gate_weight": gate, "out": out}
        biases = {"bias": inputs.bias, "gate_bias": inputs.gate_bias}
        sizes = {"rows": rows, "depth": depth, "columns": out.shape[-1]}
        constants = {
            "ACTIVATION": inputs.activation,
            "PACKED": inputs.packed,
            "EVEN_DEPTH": depth % tile.block_k == 0,
        }
        self.start(
            (triton.cdiv(rows, tile.block_m) * triton.cdiv(kept, tile.block_n), plans),
            tensors | biases | sizes | strides("weight", weight, "row", "column") | constants,
            warps=tile.warps,
            stages=tile.stages,
            survivors=survivors,
            product=product,
            tile=tile,
        )
        return out

    @override
    def cases(self) -> Iterator[Case]:
        small = {"tile": Tile(16, 16, 32, warps=4, stages=2, group_rows=2)}
        activations = ["", *ACTIVATIONS]
        for features, width, depth in ((37, 1, 63), (2 * 37, 2, 64), (8 * 13, 8, 40)):
            for gated in (True, False):
                activations = [*activations[1:], activations[0]]
                plans = [range(9, 21), [], range(3, features - 5)][: 1 + 2 * gated]
                gate, weight = torch.randn(2, features, depth) / depth**0.5
                gate_bias, bias = torch.randn(2, features)
                if not gated:  # what survives nowhere is not read, but for the rest of its unit
                    weight[: 9 // width * width] = weight[-(-21 // width) * width :] = torch.nan
                survivors = Survivors.of(plans, features, width)
                x = torch.randn(3, 7, depth)
                inputs = ProjectRows(
                    x,
                    weight.t().contiguous().t() if width == 2 else weight,
                    bias,
                    survivors,
                    True,
                    (gate.t().contiguous().t() if width == 2 else gate) if gated else None,
                    gate_bias if gated and width > 1 else None,
                    activations[0],
                )
                name = f"width {width}, {'gated' * gated}, {activations[0]}"
                yield Case(name, inputs, small)
                plain = replace(
                    inputs, bias=None if gated else bias, gate=None, gate_bias=None, activation=""
                )
                for packed, form in ((False, "scattered"), (True, "packed")):
                    name = f"width {width}, {len(plans)} plans, {form}"
                    yield Case(name, replace(plain, packed=packed), small)


project_rows = ProjectRowsKernel()
