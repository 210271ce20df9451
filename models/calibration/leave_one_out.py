"""Switches left out: what an output is off by, a different set of them on every row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planner.ir.graph import Graph, Site
from planner.models.calibration.replay import Replay
from planner.models.running.masked import Gates, MaskedExecutor
from planner.solver.problem import Floats

MEASURES = ("loss", "kl")
_FIELDS = {"layer": "layers", "heads": "heads", "mlp": "mlp"}


@dataclass(frozen=True)
class Switch:
    """One switch of a site."""

    site: Site
    index: int


def switches_of(graph: Graph) -> tuple[Switch, ...]:
    """All layer, head and MLP switches, by layer: neighbours share a start of the pass."""
    sites = sorted((s for s in graph.sites if s.kind in _FIELDS), key=lambda site: site.layer)
    return tuple(Switch(site, index) for site in sites for index in range(site.switches))


def as_gates(columns: dict[Site, Tensor]) -> Gates:
    """Gates from one tensor of shape (rows, switches) per site."""
    fields: dict[str, dict[int, Any]] = {name: {} for name in _FIELDS.values()}
    for site, column in columns.items():
        fields[_FIELDS[site.kind]][site.layer] = column[:, 0] if site.kind == "layer" else column
    return Gates(**fields)


def loss(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the answer in nats per token, shape (rows,).

    `log_probabilities` has shape (rows, answer, vocabulary), `labels` (answer,) or (rows, answer).
    """
    index = labels.expand(log_probabilities.shape[:2]).unsqueeze(-1)
    return -log_probabilities.gather(-1, index).squeeze(-1).mean(-1)


def measure(log_probabilities: Tensor, replay: Replay, kind: str) -> Tensor:
    """Distance from the base model in nats per answer token, shape (rows,).

    Change of the loss, or of ``kl``, KL(base || output), for (rows, answer, vocabulary).
    """
    if kind == "kl":
        chances, apart = replay.base.exp(), torch.empty_like(replay.base)
        # Row by row in one place: over a large vocabulary fresh memory costs more than sums do.
        rows = (torch.sub(replay.base, row, out=apart) for row in log_probabilities)
        return torch.stack([row.mul_(chances).sum(-1).mean() for row in rows])
    labels = replay.sample.labels
    return loss(log_probabilities, labels) - loss(replay.base[None], labels)


@torch.no_grad()
def losses_without(
    executor: MaskedExecutor, replay: Replay, sets: Sequence[Sequence[Switch]], kind: str
) -> Floats:
    """What switching sets off does to one sample; shape (sets,), positive where it hurts.

    As many are measured at once as the replay has rows, so sets that begin with the same layer
    should be neighbours; `kind` is one of `MEASURES`.
    """
    found = []
    for start in range(0, len(sets), replay.rows):
        some = sets[start : start + replay.rows]
        columns: dict[Site, Tensor] = {}
        for row, off in enumerate(some):
            for switch in off:
                ones = torch.ones(replay.rows, switch.site.switches)
                columns.setdefault(switch.site, ones)[row, switch.index] = 0
        with executor.using(as_gates(columns)):
            first = min((site.layer for site in columns), default=0)
            outputs = replay.log_probabilities(first)
        found.append(measure(outputs, replay, kind)[: len(some)].double().cpu().numpy())
    return np.concatenate(found)
