"""The weights of what a plan keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from planner.ir.intervals import Intervals
from planner.models.running.bindings import BoundLinear
from planner.models.running.program import Program


def kept_weights(model: Any, program: Program) -> dict[str, Tensor]:
    """The base model's state dict without what a program of one plan leaves out; names stay."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for layer in program.layers:
        group = layer.groups[0]
        if not group.on:
            prefix = f"{layer.layer.path}."
            state = {name: v for name, v in state.items() if not name.startswith(prefix)}
            continue
        for site, lanes in ((layer.layer.heads, group.heads), (layer.layer.mlp, group.mlp)):
            if site is not None and lanes is not None:
                for linear in site.linears:
                    state |= _sliced(linear, lanes)
    return state


def cast(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights in another precision (None: as they are); a tensor with two names stays one."""
    done: dict[tuple[int, torch.Size], Tensor] = {}
    return {
        name: value
        if dtype is None or not value.is_floating_point()
        else done.setdefault((value.data_ptr(), value.shape), value.to(dtype))
        for name, value in state.items()
    }


@torch.no_grad()
def _sliced(linear: BoundLinear, lanes: Intervals) -> dict[str, Tensor]:
    """Copies of one linear's parameters with the kept features."""
    runs = linear.runs(lanes) or ((0, 0),)
    weight = torch.cat([linear.weight.narrow(linear.dim, a, b - a) for a, b in runs], linear.dim)
    stored = weight.t() if isinstance(linear.module, Conv1D) else weight
    sliced = {f"{linear.path}.weight": stored.contiguous()}
    if linear.bias is not None and linear.axis == "out":
        sliced[f"{linear.path}.bias"] = torch.cat([linear.bias[a:b] for a, b in runs])
    return sliced
