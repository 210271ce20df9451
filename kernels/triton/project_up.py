"""The first half of an MLP over surviving neurons: gate, up and activation in one kernel.

Surviving neurons of a plan are tiled as one run of virtual columns through the index list, so a
switch of 344 neurons wastes nothing: only the last tile of a plan has a tail.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from planner.kernels.ops.project_up import ACTIVATIONS, naive_project_up
from planner.kernels.survivors import Survivors
from planner.kernels.triton.kernel import Case, Kernel, product_seconds, require
from planner.kernels.triton.launch import Launch, target_for
from planner.kernels.triton.primitives import activate, surviving_features, tile_order
from planner.kernels.triton.tiles import Target, Tile, matmul_tile

__all__ = ["project_up"]


@triton.jit(do_not_specialize=["rows", "slots"])
def project_up_kernel(
    x,  # [samples, rows, depth]
    gate_weight,  # [neurons, depth] or None; strided as up_weight
    up_weight,  # [neurons, depth], strided
    gate_bias,  # [neurons] or None
    up_bias,  # [neurons] or None
    units,  # [samples, slots] int32
    counts,  # [samples] int32
    lanes,  # [samples, slots] int32 or None
    out,  # [samples, rows, slots * WIDTH]
    rows,
    depth,
    slots,
    weight_row,  # strides, in elements
    weight_column,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """out[:, j] = act(x @ gate[f(j)]) * (x @ up[f(j)]), f(j) = neuron of virtual column j.

    Columns at or beyond ``counts * WIDTH`` are not written; neurons that do not survive inside a
    unit give 0. bf16, fp16 or fp32, accumulated in float32. Rows of gate and up are interleaved
    into one weight tile, so that both factors of a neuron meet in one thread's registers.
    Source: arXiv 2002.05202, eq. 6.
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
    neuron = surviving_features(units, column, column < survivors, WIDTH)
    if PARTS == 2:
        # Alignment does not survive the choice between pointers unless it is stated.
        weight_start = tl.multiple_of(tl.where(part % 2 == 0, gate_weight, up_weight), 16)
    else:
        weight_start = up_weight
    weight_start += neuron.to(tl.int64) * weight_row
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
    neuron = surviving_features(units, column, kept, WIDTH)
    if PARTS == 2:
        gate, up = tl.split(tl.reshape(accumulator, [BLOCK_M, BLOCK_N, 2]))
        if gate_bias is not None:
            gate += tl.load(gate_bias + neuron).to(tl.float32)[None, :]
        if up_bias is not None:
            up += tl.load(up_bias + neuron).to(tl.float32)[None, :]
        hidden = activate(gate, ACTIVATION) * up  # [BLOCK_M, BLOCK_N]
    else:
        up = accumulator
        if up_bias is not None:
            up += tl.load(up_bias + neuron).to(tl.float32)[None, :]
        hidden = activate(up, ACTIVATION)
    if lanes is not None:
        bits = tl.load(lanes + sample * slots + column // WIDTH, mask=kept, other=0)
        hidden = tl.where(((bits >> (column % WIDTH)) & 1)[None, :] != 0, hidden, 0.0)
    address = (sample * rows + row).to(tl.int64)[:, None] * (slots * WIDTH) + column[None, :]
    mask = (row < rows)[:, None] & kept[None, :]
    tl.store(out + address, hidden.to(out.dtype.element_ty), mask=mask)


class ProjectUp(Kernel):
    """See `planner.kernels.ops.project_up`."""

    function = project_up_kernel
    of_model = frozenset({"depth", "weight_row", "weight_column"})
    of_plan = frozenset({"slots"})
    plan_axis = 1
    twin = staticmethod(naive_project_up)

    def __call__(
        self,
        x: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        gate: Tensor | None,
        gate_bias: Tensor | None,
        activation: str,
        survivors: Survivors,
        tile: Tile | None = None,
    ) -> Tensor:
        """Arguments and result as those of the op; `tile` is for tests."""
        (neurons, depth), plans = up.shape, survivors.plans
        require(x.shape[-1] == depth, f"{x.shape[-1]} features meet a weight for {depth}.")
        require(x.dtype == up.dtype, f"{x.dtype} features meet a weight in {up.dtype}.")
        require(activation in ACTIVATIONS, f"no kernel has the activation '{activation}'.")
        if gate is not None:
            require(gate.shape == up.shape, f"a gate of shape {tuple(gate.shape)} for {up.shape}.")
            if gate.stride() != up.stride():
                gate, up = gate.contiguous(), up.contiguous()
        columns = survivors.slots * survivors.width
        require(columns <= neurons, f"{columns} survivors of {neurons} neurons.")
        out = x.new_empty(*x.shape[:-1], columns)
        rows = x.numel() // depth // plans
        parts = 1 if gate is None else 2
        tile = tile or matmul_tile(
            rows,
            columns,
            depth,
            target_for(x),
            samples=plans,
            element_bytes=x.element_size(),
            parts=parts,
        )
        self.start(
            (triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n), plans),
            {
                "x": x.contiguous(),
                "gate_weight": gate,
                "up_weight": up,
                "gate_bias": gate_bias,
                "up_bias": up_bias,
                "units": survivors.units,
                "counts": survivors.counts,
                "lanes": survivors.lanes,
                "out": out,
                "rows": rows,
                "depth": depth,
                "slots": survivors.slots,
                "weight_row": up.stride(0),
                "weight_column": up.stride(1),
                "WIDTH": survivors.width,
                "ACTIVATION": activation,
                "EVEN_DEPTH": depth % tile.block_k == 0,
                **tile.blocks,
            },
            warps=tile.warps,
            stages=tile.stages,
            survivors=survivors,
        )
        return out

    def seconds(self, launch: Launch, target: Target) -> float:
        """Of a product with the neurons there is room for, gate and up together."""
        given = launch.arguments
        columns, parts = given["slots"] * given["WIDTH"], 1 + (given["gate_weight"] is not None)
        return product_seconds(launch, target, given["rows"], columns, given["depth"], parts=parts)

    def cases(self) -> Iterator[Case]:
        """Units of all widths that survive in part, each activation, with gates and without."""
        small = Tile(block_m=16, block_n=16, block_k=32, warps=4, stages=2, group_rows=2)
        activations = [*ACTIVATIONS]
        for neurons, width, depth in ((37, 1, 63), (2 * 37, 2, 64), (8 * 13, 8, 40)):
            for gated in (True, False):
                plans = [range(9, 21), [], range(3, neurons - 5)][: 1 + 2 * gated]
                weights = torch.randn(2, neurons, depth) / depth**0.5
                biases = torch.randn(2, neurons)
                if not gated:  # what survives nowhere is not read, but for the rest of its unit
                    weights[:, : 9 // width * width] = weights[:, -(-21 // width) * width :] = (
                        torch.nan
                    )
                inputs = {
                    "x": torch.randn(3, 7, depth),
                    "up": weights[0],
                    "up_bias": biases[0],
                    "gate": weights[1] if gated else None,
                    "gate_bias": biases[1] if gated and width > 1 else None,
                    "activation": activations[0],
                    "survivors": Survivors.of(plans, neurons, width),
                }
                name = f"width {width}, {'gated' if gated else 'plain'}, {activations[0]}"
                activations = [*activations[1:], activations[0]]
                yield Case(name, inputs, {"tile": small})


project_up = ProjectUp()
