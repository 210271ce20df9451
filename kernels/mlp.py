"""The first half of an MLP over surviving neurons: norm, gate, up and activation in one kernel.

Surviving neurons of a plan are tiled as one run of virtual columns through the index list, so a
switch of 344 neurons wastes nothing: only the last tile of a plan has a tail.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from planner.kernels.launch import launch, target_for
from planner.kernels.norm import normalize
from planner.kernels.primitives import activate, surviving_features, tile_order
from planner.kernels.records import MLPWeights, Survivors
from planner.kernels.tiles import Tile, fold_norm, matmul_tile

__all__ = ["project_up", "project_up_kernel"]


@triton.jit(do_not_specialize=["rows", "slots"])
def project_up_kernel(
    x,  # [samples, rows, depth]
    gate_weight,  # [neurons, depth] or None
    up_weight,  # [neurons, depth]
    gate_bias,  # [neurons] or None
    up_bias,  # [neurons] or None
    norm_weight,  # [depth] or None: x is taken as it is
    units,  # [samples, slots] int32
    counts,  # [samples] int32
    lanes,  # [samples, slots] int32 or None
    out,  # [samples, rows, slots * WIDTH]
    rows,
    depth,
    slots,
    norm_eps,
    norm_offset,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """out[:, j] = act(n(x) @ gate[f(j)]) * (n(x) @ up[f(j)]), f(j) = neuron of virtual column j.

    n(x) = x * rsqrt(mean(x^2) + eps) * (offset + norm_weight): the row's mean square is summed
    up along the way and divides the finished product. Columns at or beyond ``counts * WIDTH``
    are not written; neurons that do not survive inside a unit give 0. bf16, fp16 or fp32,
    accumulated in float32. Rows of gate and up are interleaved into one weight tile, so that both
    factors of a neuron meet in one thread's registers. Source: arXiv 2002.05202, eq. 6.
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
        weight_row = tl.multiple_of(tl.where(part % 2 == 0, gate_weight, up_weight), 16)
    else:
        weight_row = up_weight
    weight_row += neuron.to(tl.int64) * depth
    k = tl.arange(0, BLOCK_K)
    x_tile = x_row[:, None] + k[None, :]  # [BLOCK_M, BLOCK_K]
    weight_tile = weight_row[:, None] + k[None, :]  # [PARTS * BLOCK_N, BLOCK_K]

    accumulator = tl.zeros([BLOCK_M, PARTS * BLOCK_N], dtype=tl.float32)
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = (start + k) < depth
        if EVEN_DEPTH:
            a = tl.load(x_tile + start)
            w = tl.load(weight_tile + start)
        else:
            a = tl.load(x_tile + start, mask=inside[None, :], other=0.0)
            w = tl.load(weight_tile + start, mask=inside[None, :], other=0.0)
        if norm_weight is not None:
            gain = tl.load(norm_weight + start + k, mask=inside, other=0.0).to(tl.float32)
            value = a.to(tl.float32)
            squares += tl.sum(value * value, axis=1)
            a = (value * (gain + norm_offset)[None, :]).to(w.dtype)
        accumulator = tl.dot(a, tl.trans(w), accumulator, input_precision="ieee")
    if norm_weight is not None:
        accumulator *= tl.rsqrt(squares / depth + norm_eps)[:, None]

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


def project_up(
    x: Tensor, weights: MLPWeights, survivors: Survivors, tile: Tile | None = None
) -> Tensor:
    """Activations of the surviving neurons, packed to the left. Twin: `naive.project_up`.

    Args:
        x: (samples, rows, hidden), one sample per plan.
        weights: the MLP's; its norm is applied.
        survivors: surviving neurons.
        tile: for tests; by default `tiles.matmul_tile` chooses.

    Returns:
        (samples, rows, slots * width); columns beyond a plan's count are undefined.
    """
    samples, rows, depth = x.shape
    columns = survivors.slots * survivors.width
    parts = 1 if weights.gate is None else 2
    norm = weights.norm
    if norm is not None and not (norm.kind == "rms" and fold_norm(rows)):
        x, norm = normalize(x, norm), None
    tile = tile or matmul_tile(
        rows,
        columns,
        depth,
        target_for(x),
        samples=samples,
        element_bytes=x.element_size(),
        parts=parts,
    )
    out = x.new_empty(samples, rows, columns)
    launch(
        project_up_kernel,
        (triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n), samples),
        {
            "x": x,
            "gate_weight": weights.gate,
            "up_weight": weights.up,
            "gate_bias": weights.gate_bias,
            "up_bias": weights.up_bias,
            "norm_weight": None if norm is None else norm.weight,
            "units": survivors.units,
            "counts": survivors.counts,
            "lanes": survivors.lanes,
            "out": out,
            "rows": rows,
            "depth": depth,
            "slots": survivors.slots,
            "norm_eps": 0.0 if norm is None else norm.eps,
            "norm_offset": 0.0 if norm is None else norm.offset,
            "WIDTH": survivors.width,
            "ACTIVATION": weights.activation,
            "EVEN_DEPTH": depth % tile.block_k == 0,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_ROWS": tile.group_rows,
        },
        warps=tile.warps,
        stages=tile.stages,
    )
    return out
