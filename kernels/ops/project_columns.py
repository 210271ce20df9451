"""A linear layer over its surviving input features: the output and the down projection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from planner.kernels.ops.registration import Gradients, Op
from planner.kernels.ops.slices import length_of, parts_of, plans_of
from planner.kernels.survivors import Survivors

__all__ = ["naive_project_columns", "op", "project_columns"]


def project_columns(
    a: Tensor, weight: Tensor, bias: Tensor | None, survivors: Survivors, *, triton: bool
) -> Tensor:
    """``a @ weight[:, kept].T + bias``. Differentiable in a, weight and bias.

    Args:
        a: (batch, ..., slots * width), packed by slot; not read beyond a plan's count.
        weight: (out, in), read in place.
        bias: (out,) or None.
        survivors: surviving units of input features, which come whole; one plan, or one per sample.
        triton: whether Triton computes it, or PyTorch.

    Returns:
        (batch, ..., out); the bias where nothing survives.

    Raises:
        InputError: neither one plan nor as many as samples, or shapes that do not fit.
    """
    return op(a, weight, bias, survivors, triton=triton)


def naive_project_columns(
    a: Tensor, weight: Tensor, bias: Tensor | None, survivors: Survivors
) -> Tensor:
    """The twin: each sample by itself, on gathered columns."""
    out = []
    for sample in range(len(a)):
        features = survivors.features(sample if survivors.plans > 1 else 0)
        out.append(F.linear(a[sample][..., : len(features)], weight[:, features], bias))
    return torch.stack(out)


def _sliced(a: Tensor, weight: Tensor, bias: Tensor | None, survivors: Survivors) -> Tensor:
    out = a.new_empty(*a.shape[:-1], len(weight))
    for samples, plan in plans_of(survivors):
        rows = a[samples].flatten(end_dim=-2)
        total: Tensor | None = None
        column = 0
        for part in parts_of(survivors, plan):
            stop = column + length_of(part)
            value, columns = rows[:, column:stop], weight[:, part]
            total = value @ columns.T if total is None else total.addmm_(value, columns.T)
            column = stop
        if total is None:
            total = rows.new_zeros(len(rows), len(weight))
        out[samples] = (total if bias is None else total.add_(bias)).view_as(out[samples])
    return out


def _forward(
    a: Tensor, weight: Tensor, bias: Tensor | None, survivors: Survivors, triton: bool
) -> Tensor:
    if not triton:
        return _sliced(a, weight, bias, survivors)
    from planner.kernels.triton.project_columns import project_columns as kernel

    return kernel(a, weight, bias, survivors)


def _fake(a: Tensor, weight: Tensor, bias: Tensor | None, survivors: Survivors) -> Tensor:
    return a.new_empty(*a.shape[:-1], weight.shape[0])


def _backward(
    gradient: Tensor,
    wanted: list[str],
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    survivors: Survivors,
) -> Gradients:
    given = {"a": a, "weight": weight}
    sums = {name: torch.zeros_like(t) for name, t in given.items() if name in wanted}
    for samples, plan in plans_of(survivors):
        features = survivors.features(plan)
        d = gradient[samples]
        if "a" in sums:
            chosen = torch.zeros_like(a[samples])
            chosen[..., : len(features)] = d @ weight[:, features]
            sums["a"][samples] = chosen
        if "weight" in sums:
            rows = a[samples].flatten(end_dim=-2)[:, : len(features)]
            sums["weight"][:, features] += d.flatten(end_dim=-2).T @ rows
    if "bias" in wanted:
        sums["bias"] = gradient.flatten(end_dim=-2).sum(dim=0)
    return sums


op = Op(
    "project_columns",
    "Tensor a, Tensor weight, Tensor? bias",
    forward=_forward,
    fake=_fake,
    backward=_backward,
)
