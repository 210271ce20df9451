"""Device functions that several kernels share: tile order, surviving features, softmax."""

from __future__ import annotations

import triton
import triton.language as tl


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
def activate(x, ACTIVATION: tl.constexpr):
    """The non-linearity of an MLP, on float32; the names are those of transformers' ACT2FN."""
    if ACTIVATION == "":
        return x
    elif ACTIVATION == "silu":
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


@triton.jit
def softmax_step(scores, values, accumulator, highest, total):
    """Fold one block of scores (base 2, -inf where masked) into running softmax sums.

    Source: Dao, arXiv 2307.08691, algorithm 1; the division by `total` waits until the end.
    """
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    # A row that has seen no key yet has -inf here; 0 keeps the exponentials at 0, not NaN.
    shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(highest - shift)
    total = total * decay + tl.sum(weights, axis=1)
    accumulator = tl.dot(
        weights.to(values.dtype), values, accumulator * decay[:, None], input_precision="ieee"
    )
    return accumulator, new_highest, total
