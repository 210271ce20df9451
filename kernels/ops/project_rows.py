"""Surviving output features of a linear layer: queries, keys and values, an MLP's first half."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from planner.kernels.ops.kept_linear import kept_linear
from planner.kernels.ops.registration import Gradients, Op
from planner.kernels.ops.slices import length_of, parts_of, plans_of
from planner.kernels.survivors import Survivors

__all__ = ["naive_project_rows", "op", "project_rows"]


def project_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    survivors: Survivors,
    *,
    packed: bool,
    triton: bool,
) -> Tensor:
    """``x @ weight[kept].T + bias[kept]``. Differentiable in x, weight and bias.

    Args:
        x: (batch, ..., in).
        weight: (out, in), read in place.
        bias: (out,) or None.
        survivors: surviving units of output features, which survive whole; one plan, or one per
            sample.
        packed: features by slot, as many as there is room for, or each where the stock layer has
            it, the others 0.
        triton: by which of the two it is computed.

    Returns:
        (batch, ..., slots * width), undefined beyond a plan's count; or (batch, ..., out).

    Raises:
        InputError: neither one plan nor as many as samples, or shapes that do not fit.
    """
    return op(x, weight, bias, packed, survivors, triton=triton)


def naive_project_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, survivors: Survivors, packed: bool
) -> Tensor:
    """The twin: every feature is computed, then picked."""
    every = F.linear(x, weight.nan_to_num(), bias)
    shape = (*x.shape[:-1], survivors.slots * survivors.width)
    out = every.new_full(shape, torch.nan) if packed else torch.zeros_like(every)
    for sample in range(len(x)):
        features = survivors.features(sample if survivors.plans > 1 else 0)
        places = torch.arange(len(features)) if packed else features
        out[sample][..., places] = every[sample][..., features]
    return out


def _sliced(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool, survivors: Survivors
) -> Tensor:
    plans = plans_of(survivors)
    if len(plans) == 1 and survivors.runs(0) == ((0, len(weight)),):
        return F.linear(x, weight, bias)
    columns = survivors.slots * survivors.width if packed else len(weight)
    out = x.new_zeros(*x.shape[:-1], columns)
    for samples, plan in plans:
        chosen = out if isinstance(samples, slice) else out[samples]
        column = 0
        for part in parts_of(survivors, plan):
            stop = column + length_of(part)
            rows = kept_linear(x[samples], weight[part], None if bias is None else bias[part])
            chosen[..., slice(column, stop) if packed else part] = rows
            column = stop
        if not isinstance(samples, slice):
            out[samples] = chosen
    return out


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: bool,
    survivors: Survivors,
    triton: bool,
) -> Tensor:
    if not triton:
        return _sliced(x, weight, bias, packed, survivors)
    from planner.kernels.triton.project_rows import project_rows as kernel

    return kernel(x, weight, bias, survivors, packed)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool, survivors: Survivors
) -> Tensor:
    columns = survivors.slots * survivors.width if packed else weight.shape[0]
    return x.new_empty(*x.shape[:-1], columns)


def _backward(
    gradient: Tensor,
    wanted: list[str],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: bool,
    survivors: Survivors,
) -> Gradients:
    given = {"x": x, "weight": weight, "bias": bias}
    sums = {
        name: torch.zeros_like(t) for name, t in given.items() if name in wanted and t is not None
    }
    for samples, plan in plans_of(survivors):
        features = survivors.features(plan)
        d = gradient[samples].flatten(end_dim=-2)
        d = d[:, : len(features)] if packed else d[:, features]
        if "x" in sums:
            sums["x"][samples] = (d @ weight[features]).view_as(x[samples])
        if "weight" in sums:
            sums["weight"][features] += d.T @ x[samples].flatten(end_dim=-2)
        if "bias" in sums:
            sums["bias"][features] += d.sum(dim=0)
    return sums


op = Op(
    "project_rows",
    "Tensor x, Tensor weight, Tensor? bias, bool packed",
    forward=_forward,
    fake=_fake,
    backward=_backward,
)
