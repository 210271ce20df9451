"""Surviving output features of a linear layer, or of the first half of an MLP in one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from planner.kernels.ops.kept_linear import kept_linear
from planner.kernels.ops.op import Gradients, Op
from planner.kernels.survivors import Part, Survivors, length_of

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
    "": lambda d, x: d,
    "silu": aten.silu_backward,
    "gelu": aten.gelu_backward,
    "gelu_pytorch_tanh": lambda d, x: aten.gelu_backward(d, x, approximate="tanh"),
    "quick_gelu": lambda d, x: d * _quick_gelu_slope(x),
    "relu": lambda d, x: d * (x > 0),
}


def _quick_gelu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * x)
    return gate + 1.702 * x * gate * (1 - gate)


@dataclass(frozen=True, eq=False)
class ProjectRows(Op, name="project_rows"):
    """``act(gate(x)) * linear(x)`` of kept features, ``act(linear(x))`` without a gate.

    Differentiable in x, weights and biases. Gives (batch, ..., slots * width), undefined beyond a
    plan's count, where the result is packed; (batch, ..., out) otherwise. Features that do not
    survive in a unit that does are 0. Source of gates: Shazeer, arXiv 2002.05202, eq. 6.
    """

    x: Tensor  # (batch, ..., in)
    weight: Tensor  # (out, in), read in place
    bias: Tensor | None  # (out,) or None
    survivors: Survivors  # of output features
    # Features by slot, as many as there is room for; or each where the stock layer has it, the
    # others 0.
    packed: bool = True
    # As weight and bias, or None.
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    activation: str = ""  # a key of `ACTIVATIONS`; empty for none

    @override
    def twin(self) -> Tensor:
        survivors = self.survivors
        every = F.linear(self.x, self.weight.nan_to_num(), self.bias)
        if self.gate is None:
            every = self._act(every)
        else:
            every = self._act(F.linear(self.x, self.gate.nan_to_num(), self.gate_bias)) * every
        out = torch.full_like(self.empty(), torch.nan) if self.packed else torch.zeros_like(every)
        for sample in range(len(out)):
            plan = survivors.plan_of(sample)
            features = survivors.features(plan)
            alive = torch.isin(features, survivors.kept(plan))
            places = torch.arange(len(features)) if self.packed else features
            out[sample][..., places] = every[sample][..., features] * alive
        return out

    @override
    def by_pytorch(self) -> Tensor:
        plans = self.survivors.groups()
        out = self.empty() if self.packed else torch.zeros_like(self.empty())
        for samples, plan in plans:
            parts, alive = self.survivors.parts(plan), self.survivors.alive(plan)
            if len(plans) == 1 and alive is None and length_of(*parts) == len(self.weight):
                return self._features(self.x, slice(None))
            chosen, column = out[samples], 0
            for part in parts:
                stop = column + length_of(part)
                place = slice(column, stop) if self.packed else part
                if isinstance(place, slice):
                    self._features(self.x[samples], part, chosen[..., place])
                else:
                    chosen[..., place] = self._features(self.x[samples], part)
                column = stop
            if alive is not None:
                place = slice(column) if self.packed else self.survivors.features(plan)
                chosen[..., place] *= alive
            if self.packed:
                chosen[..., column:] = 0
            if not isinstance(samples, slice):
                out[samples] = chosen
        return out

    @override
    def empty(self) -> Tensor:
        kept = self.survivors.slots * self.survivors.width
        return self.x.new_empty(*self.x.shape[:-1], kept if self.packed else self.weight.shape[0])

    @override
    def gradients(self, gradient: Tensor, wanted: list[str]) -> Gradients:
        x, weight, gate = self.x, self.weight, self.gate
        sums = {name: torch.zeros_like(getattr(self, name)) for name in wanted}

        def add(names: tuple[str, str], features: Tensor, d: Tensor, rows: Tensor) -> None:
            if names[0] in sums:
                sums[names[0]][features] += d.T @ rows
            if names[1] in sums:
                sums[names[1]][features] += d.sum(dim=0)

        for samples, plan in self.survivors.groups():
            kept, alive = self.survivors.features(plan), self.survivors.alive(plan)
            rows = x[samples].flatten(end_dim=-2)
            d = gradient[samples].flatten(end_dim=-2)
            d = d[:, : len(kept)] if self.packed else d[:, kept]
            d = d if alive is None else d * alive
            linear, slope = _rows_of(rows, weight, self.bias, kept), _SLOPES[self.activation]
            if gate is None:
                d_linear = slope(d, linear)
                d_x = d_linear @ weight[kept]
            else:
                gated = _rows_of(rows, gate, self.gate_bias, kept)
                d_linear, d_gate = d * self._act(gated), slope(d * linear, gated)
                d_x = d_linear @ weight[kept] + d_gate @ gate[kept]
                add(("gate", "gate_bias"), kept, d_gate, rows)
            add(("weight", "bias"), kept, d_linear, rows)
            if "x" in sums:
                sums["x"][samples] = d_x.view_as(x[samples])
        return sums

    def _act(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x) if self.activation else x

    def _features(self, x: Tensor, part: Part, out: Tensor | None = None) -> Tensor:
        """Some features, written to `out` where there is one."""
        linear = _rows_of(x, self.weight, self.bias, part)
        if self.gate is None:
            features = self._act(linear)
            return features if out is None else out.copy_(features)
        gate = self._act(_rows_of(x, self.gate, self.gate_bias, part))
        return torch.mul(linear, gate, out=linear if out is None else out)


def _rows_of(x: Tensor, weight: Tensor, bias: Tensor | None, part: Part) -> Tensor:
    return kept_linear(x, weight[part], None if bias is None else bias[part])
