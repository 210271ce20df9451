"""Device functions that several kernels share: tile order, unit addressing, activations."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "pair_lane", "surviving_features", "tile_order", "unit_in_order"]


@triton.jit
def tile_order(program, row_tiles, column_tiles, GROUP_ROWS: tl.constexpr):
    """(row tile, column tile) of a program, in bands of GROUP_ROWS row tiles.

    Programs that run at the same time then share weight rows in L2, not stream each its own.
    """
    band_size = GROUP_ROWS * column_tiles
    first_row = (program // band_size) * GROUP_ROWS
    rows_in_band = tl.minimum(row_tiles - first_row, GROUP_ROWS)
    within = program % band_size
    return first_row + within % rows_in_band, within // rows_in_band


@triton.jit
def surviving_features(units, columns, inside, width):
    """Feature indices of virtual columns: ``units[column // width] * width + column % width``.

    Columns outside give feature 0, which is safe to read and never stored.
    """
    unit = tl.load(units + columns // width, mask=inside, other=0)
    return tl.where(inside, unit * width + columns % width, 0)


@triton.jit
def unit_in_order(units, count, place, SLOT_BITS: tl.constexpr):
    """The unit at a place of the order: survivors first, then the units that do not survive.

    Of ascending survivors, ``units[i] - i`` is how many units below survivor i are missing: the
    z-th missing unit follows as many survivors as have at most z missing below them, which are
    found by halving. SLOT_BITS is enough to count all units. Places beyond these give anything.
    """
    missing = place - count
    below = tl.zeros_like(place)
    for bit in tl.static_range(SLOT_BITS):
        step = 1 << (SLOT_BITS - 1 - bit)
        index = below + step - 1
        entry = tl.load(units + index, mask=index < count, other=2147483647)
        below += tl.where(entry - index <= missing, step, 0)
    survivor = tl.load(units + place, mask=place < count, other=0)
    return tl.where(place < count, survivor, missing + below)


@triton.jit
def pair_lane(pair, member, ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Lane of a head that is `member` (0 or 1) of a pair of lanes.

    Rotation pairs lane i with lane i + ROTARY/2 (Su et al., arXiv 2104.09864, in the half-split
    order that transformers uses); lanes beyond ROTARY are paired likewise and do not turn. Reading
    weight rows pair by pair puts both members into neighbouring accumulator columns, which one
    thread holds: the rotation needs no exchange, and the lanes of a member are stored in a run.
    """
    REST: tl.constexpr = (HEAD_DIM - ROTARY) // 2
    turning = pair + member * (ROTARY // 2)
    resting = pair + ROTARY // 2 + member * REST
    return tl.where(pair < ROTARY // 2, turning, resting)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The non-linearity of an MLP, on float32; the names are those of transformers' ACT2FN."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # tanh(y) = 2 sigmoid(2y) - 1
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        return tl.maximum(x, 0.0)
