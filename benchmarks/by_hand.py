"""Stock models cut to a plan by hand, as somebody would who had one plan and no planner.

Linears are built anew with the rows of the heads and neurons that stay, layers that are off are
taken out, and hooks leave dropped image tokens behind. What runs then is transformers' own code on
smaller tensors, so its time is what a plan can be expected to reach on this runtime.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from planner.ir.graph import Graph
from planner.ir.intervals import Intervals
from planner.plan import Plan


def cut_by_hand(stock: Any, plan: Plan, graph: Graph, left: Tensor | None = None) -> Any:
    """A copy of a LLaMA-shaped model, or of a LLaVA around one, cut to a plan.

    Args:
        stock: the model; weights that stay whole are shared with it.
        plan: what to keep, with at most one token stage.
        graph: of the model.
        left: places of the tokens that go on behind the token stage, shape (left,).
    """
    model = copy.deepcopy(stock, {id(p): p for p in stock.parameters()})
    decoder = model.get_decoder()
    kept: list[nn.Module] = []
    for index, layer in enumerate(decoder.layers):
        if index in plan.layers_off:
            continue
        attention, mlp = layer.self_attn, layer.mlp
        heads, neurons = (plan.kept(graph.sites_by_name[f"{s}.{index}"]) for s in ("heads", "mlp"))
        if not heads.everything:
            rows = _features(heads.lanes, attention.head_dim)
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(attention, name, _linear(getattr(attention, name).weight[rows]))
            attention.o_proj = _linear(attention.o_proj.weight[:, rows])
        if not neurons.everything:
            rows = _features(neurons.lanes, 1)
            for name in ("gate_proj", "up_proj"):
                setattr(mlp, name, _linear(getattr(mlp, name).weight[rows]))
            mlp.down_proj = _linear(mlp.down_proj.weight[:, rows])
        attention.layer_idx = len(kept)
        if left is not None and index >= plan.tokens[0].layer:
            layer.register_forward_pre_hook(_Leave(left), with_kwargs=True)
        kept.append(layer)
    decoder.layers = nn.ModuleList(kept)
    decoder.config.num_hidden_layers = len(kept)
    return model


class _Leave:
    """Goes before a layer: of a prompt, only the tokens that are left enter it."""

    def __init__(self, left: Tensor) -> None:
        self.left = left

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        if hidden.shape[1] == 1:
            return args, kwargs
        rotary = [part.index_select(1, self.left) for part in kwargs["position_embeddings"]]
        if hidden.shape[1] > len(self.left):
            hidden = hidden.index_select(1, self.left)
        return (hidden, *args[1:]), kwargs | {"position_embeddings": tuple(rotary)}


def _features(kept: Intervals, size: int) -> Tensor:
    """Features of kept lanes, each of so many."""
    return torch.cat([torch.arange(start * size, stop * size) for start, stop in kept])


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous())
    return linear
