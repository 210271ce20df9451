"""Products with features of a weight that are kept in several runs.

Run by run nothing is copied; or kept features are copied together, for one product. Which takes
less time depends on the CPU, the precision and the number of rows, so it is measured, once.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache, lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner.ir.intervals import Intervals, count_of
from planner.kernels.ops.kept_linear import kept_linear
from planner.kernels.ops.product_probe import (
    CLEARLY,
    KINDS_FROM,
    MEASURED,
    numbers,
    path_of,
    ratio,
    settled,
)

# What is measured: half of a weight's features, in runs that fill tiles.
_WEIGHT, _RUNS = (1408, 1024), tuple((start, start + 192) for start in range(0, 1408, 384))


def product_of_runs(
    x: Tensor, weight: Tensor, bias: Tensor | None, dim: int, runs: Intervals
) -> Tensor:
    """`F.linear` with some features of a weight.

    Args:
        x: shape (..., in features), of which those are left that are kept.
        weight: shape (out features, in features), all of them.
        bias: shape (out features,), all of them.
        dim: which dimension of the weight is narrowed.
        runs: what is kept of it, ascending; at least one, which may be empty.
    """
    if dim == 0 and bias is not None:
        bias = together(bias, 0, runs)
    if _copies(x, weight, dim, runs):
        return kept_linear(x, together(weight, dim, runs), bias)
    return _by_rows(x, weight, bias, runs) if dim == 0 else _by_columns(x, weight, bias, runs)


def together(tensor: Tensor, dim: int, runs: Intervals) -> Tensor:
    """Runs of a tensor along a dimension, copied together; one run is a view."""
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in runs]
    if len(parts) == 1:
        return parts[0]
    if torch.is_grad_enabled() and tensor.requires_grad:
        return torch.cat(parts, dim)
    shape = list(tensor.shape)
    shape[dim] = count_of(runs)
    if dim == 0 and _selects(tensor):
        return tensor.index_select(0, _numbers(runs))
    copy = tensor.new_empty(shape)
    # Copies run on all threads, `torch.cat` on one.
    for part, place in zip(parts, copy.split([stop - start for start, stop in runs], dim)):
        place.copy_(part)
    return copy


def _selects(tensor: Tensor) -> bool:
    """Whether rows are copied by one operator: half of the time of a copy for each run."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    return plain and tensor.device.type == "cpu" and tensor.is_contiguous()


# All linears of a site have the same runs.
@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _numbers(runs: Intervals) -> Tensor:
    """What lies in runs."""
    return torch.cat([torch.arange(start, stop, device="cpu") for start, stop in runs])


def _copies(x: Tensor, weight: Tensor, dim: int, runs: Intervals) -> bool:
    """Whether kept features are copied together."""
    rows = x.numel() // max(x.shape[-1], 1)
    compiling = torch.compiler.is_compiling()
    if len(runs) == 1 or weight.device.type != "cpu" or compiling or not rows:
        return False
    kinds = copying_is_faster(torch.get_num_threads(), weight.dtype, dim)
    return kinds[bisect_right(KINDS_FROM, rows) - 1]


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, runs: Intervals) -> Tensor:
    sizes = [stop - start for start, stop in runs]
    biases = [None] * len(runs) if bias is None else bias.split(sizes)
    parts = [
        kept_linear(x, weight[start:stop], part)
        for (start, stop), part in zip(runs, biases, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _by_columns(x: Tensor, weight: Tensor, bias: Tensor | None, runs: Intervals) -> Tensor:
    if len(runs) == 1:
        ((start, stop),) = runs
        return kept_linear(x, weight[:, start:stop], bias)
    rows = x.flatten(0, -2)
    parts = rows.split([stop - start for start, stop in runs], -1)
    total = F.linear(parts[0], weight[:, slice(*runs[0])], bias)
    same = x.dtype == weight.dtype == total.dtype
    # Into the same memory, a sum costs no pass over the output of its own.
    in_place = same and total.dtype.itemsize >= 4 and not total.requires_grad
    kind = total.dtype
    for part, run in zip(parts[1:], runs[1:], strict=True):
        columns = weight[:, slice(*run)]
        if in_place:
            total = torch.addmm(total, part, columns.t(), out=total)
        else:
            # Rounded once, at the end, as one product is.
            total = total.float() if kind.itemsize < 4 else total
            total = total + F.linear(part, columns)
    return total.to(kind).reshape(*x.shape[:-1], len(weight))


@cache
def copying_is_faster(threads: int, dtype: torch.dtype, dim: int) -> tuple[bool, ...]:
    """For each kind of products, whether kept features are copied together for every product."""
    return settled(path_of(threads, str(dtype), dim, _RUNS), partial(_measured, dtype, dim))


@torch.no_grad()
def _measured(dtype: torch.dtype, dim: int) -> tuple[bool, ...]:
    weight = numbers(*(_WEIGHT if dim == 0 else _WEIGHT[::-1])).to(dtype)
    by_runs = _by_rows if dim == 0 else _by_columns
    found = []
    for rows in MEASURED:
        x = numbers(rows, weight.shape[1] if dim == 0 else count_of(_RUNS)).to(dtype)
        copied = partial(_copied_product, x, weight, dim)
        found.append(ratio(copied, partial(by_runs, x, weight, None, _RUNS)) < CLEARLY)
    return tuple(found)


def _copied_product(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    return kept_linear(x, together(weight, dim, _RUNS), None)
