"""Activations of an MLP's surviving neurons: gate, up and activation in one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from planner.kernels.ops.kept_linear import kept_linear
from planner.kernels.ops.registration import Gradients, Op
from planner.kernels.ops.slices import Part, length_of, parts_of, plans_of
from planner.kernels.survivors import Survivors

__all__ = ["ACTIVATIONS", "naive_project_up", "op", "project_up"]

aten = torch.ops.aten

# By transformers' names (ACT2FN).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": aten.silu_backward,
    "gelu": aten.gelu_backward,
    "gelu_pytorch_tanh": lambda d, x: aten.gelu_backward(d, x, approximate="tanh"),
    "quick_gelu": lambda d, x: d * _quick_gelu_slope(x),
    "relu": lambda d, x: d * (x > 0),
}


def _quick_gelu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * x)
    return gate + 1.702 * x * gate * (1 - gate)


def project_up(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    survivors: Survivors,
    *,
    triton: bool,
) -> Tensor:
    """``act(gate(x)) * up(x)``, or ``act(up(x))`` without a gate, of surviving neurons.

    Differentiable in x, weights and biases. Source: Shazeer, arXiv 2002.05202, eq. 6.

    Args:
        x: (batch, ..., in).
        up, gate: (neurons, in), read in place.
        up_bias, gate_bias: (neurons,) or None.
        activation: a key of `ACTIVATIONS`.
        survivors: surviving neurons, of which a unit may survive in part; one plan, or one per
            sample.
        triton: whether Triton computes it, or PyTorch.

    Returns:
        (batch, ..., slots * width), packed by slot: 0 for neurons that do not survive in a unit,
        undefined beyond a plan's count.

    Raises:
        InputError: neither one plan nor as many as samples, or shapes that do not fit.
    """
    return op(x, up, up_bias, gate, gate_bias, activation, survivors, triton=triton)


def naive_project_up(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    survivors: Survivors,
) -> Tensor:
    """The twin: every neuron is computed, then picked and masked."""
    every = F.linear(x, up.nan_to_num(), up_bias)
    act = ACTIVATIONS[activation]
    if gate is None:
        every = act(every)
    else:
        every = act(F.linear(x, gate.nan_to_num(), gate_bias)) * every
    out = every.new_full((*x.shape[:-1], survivors.slots * survivors.width), torch.nan)
    for sample in range(len(x)):
        plan = sample if survivors.plans > 1 else 0
        features = survivors.features(plan)
        alive = torch.isin(features, survivors.kept(plan))
        out[sample][..., : len(features)] = every[sample][..., features] * alive
    return out


def _sliced(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    survivors: Survivors,
) -> Tensor:
    act = ACTIVATIONS[activation]
    out = x.new_zeros(*x.shape[:-1], survivors.slots * survivors.width)
    for samples, plan in plans_of(survivors):
        chosen = out if isinstance(samples, slice) else out[samples]
        rows, column = x[samples], 0
        for part in parts_of(survivors, plan):
            stop = column + length_of(part)
            value = _rows_of(rows, up, up_bias, part)
            if gate is None:
                value = act(value)
            else:
                value = value.mul_(act(_rows_of(rows, gate, gate_bias, part)))
            chosen[..., column:stop] = value
            column = stop
        alive = _alive(survivors, plan)
        if alive is not None:
            chosen[..., :column] *= alive
        if not isinstance(samples, slice):
            out[samples] = chosen
    return out


def _rows_of(x: Tensor, weight: Tensor, bias: Tensor | None, part: Part) -> Tensor:
    return kept_linear(x, weight[part], None if bias is None else bias[part])


def _alive(survivors: Survivors, plan: int) -> Tensor | None:
    """Which neurons of a plan's units survive; None where all do."""
    if survivors.lanes is None:
        return None
    return torch.isin(survivors.features(plan), survivors.kept(plan))


def _forward(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    survivors: Survivors,
    triton: bool,
) -> Tensor:
    if not triton:
        return _sliced(x, up, up_bias, gate, gate_bias, activation, survivors)
    from planner.kernels.triton.project_up import project_up as kernel

    return kernel(x, up, up_bias, gate, gate_bias, activation, survivors)


def _fake(x: Tensor, *inputs: object) -> Tensor:
    survivors = inputs[-1]
    assert isinstance(survivors, Survivors)
    return x.new_empty(*x.shape[:-1], survivors.slots * survivors.width)


def _backward(
    gradient: Tensor,
    wanted: list[str],
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    survivors: Survivors,
) -> Gradients:
    given = {"x": x, "up": up, "up_bias": up_bias, "gate": gate, "gate_bias": gate_bias}
    sums = {
        name: torch.zeros_like(t) for name, t in given.items() if name in wanted and t is not None
    }
    act, slope = ACTIVATIONS[activation], _SLOPES[activation]

    def add(name: str, features: Tensor, d: Tensor, rows: Tensor) -> None:
        if name in sums:
            sums[name][features] += d.T @ rows
        if f"{name}_bias" in sums:
            sums[f"{name}_bias"][features] += d.sum(dim=0)

    for samples, plan in plans_of(survivors):
        kept = survivors.features(plan)
        rows = x[samples].flatten(end_dim=-2)
        d = gradient[samples].flatten(end_dim=-2)[:, : len(kept)]
        alive = _alive(survivors, plan)
        d = d if alive is None else d * alive
        above = _rows_of(rows, up, up_bias, kept)
        if gate is None:
            d_up = slope(d, above)
            d_x = d_up @ up[kept]
        else:
            below = _rows_of(rows, gate, gate_bias, kept)
            d_up, d_gate = d * act(below), slope(d * above, below)
            d_x = d_up @ up[kept] + d_gate @ gate[kept]
            add("gate", kept, d_gate, rows)
        add("up", kept, d_up, rows)
        if "x" in sums:
            sums["x"][samples] = d_x.view_as(x[samples])
    return sums


op = Op(
    "project_up",
    "Tensor x, Tensor up, Tensor? up_bias, Tensor? gate, Tensor? gate_bias, str activation",
    forward=_forward,
    fake=_fake,
    backward=_backward,
)
