"""The scheduler network, and its folder on disk.

A folder holds ``scheduler.json`` and ``scheduler.safetensors`` beside the checkpoint that was
trained together with them (in the same folder, as stock transformers writes it).
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

from planner.documents import read_json
from planner.files import MEBIBYTE, output_folder, read_bytes, write_bytes, write_text
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.scheduling.latency_encoder import LatencyEncoder
from planner.models.scheduling.layouts import Layout
from planner.models.scheduling.naming import layout_of

FORMAT = 1
DESCRIPTION, WEIGHTS = "scheduler.json", "scheduler.safetensors"
# A matrix of a few hundred rows and an encoder beside it.
_MOST_BYTES = 512 * MEBIBYTE


class Scheduler(nn.Module):
    """AdaLLaVA's scheduler: a latency encoder, and one linear layer on the latency token.

    Args:
        layout: what the logits stand for.
        width: hidden size of the decoder.
        provenance: what to remember of its training.
    """

    def __init__(
        self, layout: Layout, width: int, provenance: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.layout = layout
        self.provenance = dict(provenance or {})
        self.encoder = LatencyEncoder(width, layout.levels)
        self.head = nn.Linear(width, layout.size)

    @staticmethod
    def of(graph: Graph, switches: str, provenance: Mapping[str, Any] | None = None) -> Scheduler:
        """An untrained scheduler for a model.

        Raises:
            InputError: the model cannot have these switches.
        """
        width = int(graph.properties["hidden_size"])
        return Scheduler(layout_of(switches, graph), width, provenance)

    def token(self, limits: Tensor, steps: int | None = None) -> Tensor:
        """Latency tokens (batch, width).

        The encoder is told what share of all switches may be on, by count or by cost.

        Args:
            limits: shape (batch,).
            steps: the largest limit, where it is not that of the scheduler's own layout.
        """
        most = max(1, self.layout.steps if steps is None else steps)
        token: Tensor = self.encoder(limits * (self.encoder.steps / most))
        return token

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (batch, size), float32, from the latency token's hidden states (batch, width).

        They are the raw ones that leave the last layer that always runs, not normalised.
        """
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

    Raises:
        InputError: the folder holds none, it is broken, or it was made for another model.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).exists():
        raise InputError(f"'{folder}' is no scheduler: it has no {DESCRIPTION}")
    description = read_json(folder / DESCRIPTION, "scheduler")
    try:
        weights = load(read_bytes(folder / WEIGHTS, "scheduler", _MOST_BYTES))
    except (ValueError, SafetensorError) as error:
        raise InputError(f"the scheduler in '{folder}' is broken: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputError(f"the scheduler in '{folder}' is of another format than {FORMAT}")
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
