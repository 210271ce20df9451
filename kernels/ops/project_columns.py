"""A linear layer over its surviving input features: the output and the down projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from planner.kernels.ops.op import Gradients, Op
from planner.kernels.survivors import Survivors, length_of


@dataclass(frozen=True, eq=False)
class ProjectColumns(Op, name="project_columns"):
    """``a @ weight[:, kept].T + bias``. Differentiable in a, weight and bias.

    Gives (batch, ..., out): the bias where nothing survives.
    """

    a: Tensor  # (batch, ..., slots * width), packed by slot; not read beyond a plan's count
    weight: Tensor  # (out, in), read in place
    bias: Tensor | None  # (out,) or None
    # Surviving units of input features, which come whole; one plan, or one per sample.
    survivors: Survivors

    @override
    def twin(self) -> Tensor:
        out = []
        for sample, a in enumerate(self.a):
            features = self.survivors.features(self.survivors.plan_of(sample))
            out.append(F.linear(a[..., : len(features)], self.weight[:, features], self.bias))
        return torch.stack(out)

    @override
    def by_pytorch(self) -> Tensor:
        weight, out = self.weight, self.empty()
        for samples, plan in self.survivors.groups():
            rows = self.a[samples].flatten(end_dim=-2)
            total: Tensor | None = None
            column = 0
            for part in self.survivors.parts(plan):
                stop = column + length_of(part)
                value, columns = rows[:, column:stop], weight[:, part]
                total = value @ columns.T if total is None else total.addmm_(value, columns.T)
                column = stop
            if total is None:
                total = rows.new_zeros(len(rows), len(weight))
            total = total if self.bias is None else total.add_(self.bias)
            if isinstance(samples, slice):
                return total.view_as(out)
            out[samples] = total.view_as(out[samples])
        return out

    @override
    def empty(self) -> Tensor:
        return self.a.new_empty(*self.a.shape[:-1], self.weight.shape[0])

    @override
    def gradients(self, gradient: Tensor, wanted: list[str]) -> Gradients:
        a, weight = self.a, self.weight
        sums = {name: torch.zeros_like(getattr(self, name)) for name in wanted}
        for samples, plan in self.survivors.groups():
            features = self.survivors.features(plan)
            d = gradient[samples]
            if "a" in sums:
                chosen = torch.zeros_like(a[samples])
                chosen[..., : len(features)] = d @ weight[:, features]
                sums["a"][samples] = chosen
            if "weight" in sums:
                rows = a[samples].flatten(end_dim=-2)[:, : len(features)]
                sums["weight"][:, features] += d.flatten(end_dim=-2).T @ rows
        if "bias" in sums:
            sums["bias"] = gradient.flatten(end_dim=-2).sum(dim=0)
        return sums
