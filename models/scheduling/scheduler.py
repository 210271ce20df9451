"""The scheduler network, and its folder on disk.

A folder holds ``scheduler.json`` and ``scheduler.safetensors`` beside the checkpoint that was
trained together with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from planner.documents import of_format, read_json
from planner.files import MEBIBYTE, output_folder, read_bytes, write_bytes, write_text
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.scheduling.budget_features import sinusoid
from planner.models.scheduling.cost_layout import CostSwitches
from planner.models.scheduling.layouts import LayerSwitches, Layout, UnitSwitches
from planner.models.scheduling.unified_layout import UnifiedSwitches
from planner.models.scheduling.vision_controller import VisionSide
from planner.planning.selectors.in_decoder import BUDGET_FEATURES
from planner.planning.switches import AXES
from planner.planning.unit_counting import COUNTINGS, HeadCounting, counting_of

FORMAT = 1
DESCRIPTION, WEIGHTS = "scheduler.json", "scheduler.safetensors"
# A matrix of a few hundred rows and an encoder beside it.
_MOST_BYTES = 512 * MEBIBYTE


def layout_of(name: str, graph: Graph) -> Layout:
    """The layout that users call `name`, such as ``adallava-h:unit=8`` or ``layers,heads,mlp``.

    Raises InputError: there is none, or the model cannot have it.
    """
    counting = counting_of(name)
    layout: Layout
    if isinstance(counting, HeadCounting):
        layout = UnitSwitches(graph, counting)
    elif counting:
        layout = LayerSwitches(graph, counting)
    elif (axes := set(name.partition(":")[0].split(","))) <= {*AXES, "all"}:
        layout = (UnifiedSwitches if "tokens" in axes else CostSwitches).parse(name, graph)
    else:
        raise InputError(
            f"unknown switches '{name}' of a scheduler: choose from {', '.join(COUNTINGS)}, or "
            f"some of {', '.join(AXES)} with :groups=16 or alike"
        )
    _ = layout.columns
    return layout


class LatencyEncoder(nn.Module):
    """LayerNorm, Linear(256, width), GELU, Linear(width, width) on `sinusoid` of K = `steps`."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.norm = nn.LayerNorm(BUDGET_FEATURES)
        self.first = nn.Linear(BUDGET_FEATURES, width)
        self.second = nn.Linear(width, width)

    def forward(self, level: Tensor) -> Tensor:
        """Latency tokens, shape (batch, width), for budgets of shape (batch,)."""
        features = self.norm(sinusoid(level, self.steps).to(self.norm.weight.dtype))
        token: Tensor = self.second(nn.functional.gelu(self.first(features)))
        return token


class Scheduler(nn.Module):
    """AdaLLaVA's scheduler: a latency encoder, and one linear layer on the latency token.

    The logits stand for a layout's switches. A layout over image tokens has a vision side besides,
    and no head where tokens are all there is. `provenance` is remembered of the training.
    """

    def __init__(
        self, layout: Layout, width: int, provenance: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.layout = layout
        self.provenance = dict(provenance or {})
        self.encoder = LatencyEncoder(width, layout.levels)
        self.head = nn.Linear(width, layout.size) if layout.size else None
        self.vision = None
        if isinstance(layout, UnifiedSwitches) and layout.has_vision:
            self.vision = VisionSide(width, layout.choices, spread=layout.scorer == "spread")

    @staticmethod
    def of(graph: Graph, switches: str, provenance: Mapping[str, Any] | None = None) -> Scheduler:
        """An untrained scheduler for a model; raises as `layout_of`."""
        width = int(graph.properties["hidden_size"])
        return Scheduler(layout_of(switches, graph), width, provenance)

    @property
    def flops(self) -> int:
        """Of the products of encoder and head, for one prompt."""
        linears = [self.encoder.first, self.encoder.second, self.head]
        return 2 * sum(linear.weight.numel() for linear in linears if linear is not None)

    def token(self, limits: Tensor, steps: Tensor | int | None = None) -> Tensor:
        """Latency tokens (batch, width) for limits (batch,).

        The encoder is told what share of all switches may be on, by count or by cost. `steps` is
        the largest limit, where it is not that of the scheduler's own layout; or one per sample.
        """
        most = torch.as_tensor(self.layout.steps if steps is None else steps).clamp(min=1)
        token: Tensor = self.encoder(limits * (self.encoder.steps / most.to(limits.device)))
        return token

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (batch, size), float32, from the latency token's hidden states (batch, width).

        They are the raw ones that leave the last layer that always runs, not normalised.
        """
        if self.head is None:
            return hidden.new_zeros(len(hidden), 0, dtype=torch.float32)
        weight, bias = self.head.weight.float(), self.head.bias.float()
        return nn.functional.linear(hidden.float(), weight, bias)


def save_scheduler(scheduler: Scheduler, folder: str | Path) -> None:
    """Write a scheduler into a folder, each file whole or not at all."""
    folder = output_folder(Path(folder))
    layout = scheduler.layout
    description = {
        "format": FORMAT,
        "switches": layout.name,
        "model": layout.graph.name,
        "fingerprint": layout.graph.properties["fingerprint"],
        "provenance": scheduler.provenance,
    }
    weights = {name: value.contiguous().cpu() for name, value in scheduler.state_dict().items()}
    write_bytes(folder / WEIGHTS, save(weights))
    write_text(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def load_scheduler(folder: str | Path, graph: Graph) -> Scheduler:
    """Read a scheduler for a model.

    Raises InputError: the folder holds none, it is broken, or it was made for another model.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).exists():
        raise InputError(f"'{folder}' is no scheduler: it has no {DESCRIPTION}")
    path = folder / DESCRIPTION
    description = of_format(read_json(path, "scheduler"), "format", FORMAT, path, "scheduler")
    try:
        weights = load(read_bytes(folder / WEIGHTS, "scheduler", _MOST_BYTES))
    except (ValueError, SafetensorError) as error:
        raise InputError(f"the scheduler in '{folder}' is broken: {error}") from None
    made_for = description.get("fingerprint")
    if made_for != graph.properties["fingerprint"]:
        raise InputError(
            f"the scheduler in '{folder}' was made for '{description.get('model')}' ({made_for}), "
            f"not for '{graph.name}' ({graph.properties['fingerprint']})"
        )
    switches, provenance = description.get("switches"), description.get("provenance")
    scheduler = Scheduler.of(graph, str(switches), provenance)
    shapes = {name: value.shape for name, value in scheduler.state_dict().items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise InputError(f"the scheduler in '{folder}' is broken: its weights have other shapes")
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise InputError(f"the scheduler in '{folder}' is broken: its weights are not finite")
    scheduler.load_state_dict(weights)
    return scheduler.eval()
