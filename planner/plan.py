"""The Plan: which switches stay on, for which budget, at what predicted cost, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Plan", "TokenStage"]


@dataclass(frozen=True)
class TokenStage:
    """Image tokens are reduced to `keep` (of `of`, per sample) before decoder layer `layer`.

    `selector` names the rule that picks them, for example ``fastv``, ``prumerge+`` or ``uniform``.
    """

    layer: int
    keep: int
    of: int
    selector: str = "uniform"


@dataclass(frozen=True)
class Plan:
    """An assignment of all switches of one model.

    Attributes:
        model: what the user called the model.
        fingerprint: of the Graph it was made for; a plan for another model is refused.
        layers: number of decoder layers of the base model.
        layers_off: decoder layers that do not run, ascending.
        heads: layer -> kept switches of its attention block (KV groups), ascending. A layer that is
            absent keeps all of them.
        mlp: layer -> kept switches of its MLP, ascending. Absent: all.
        mlp_switches: into how many switches each layer's neurons are divided (see `Site.bounds`).
        tokens: token stages by layer.
        budget: what was asked for, for example ``{"flops": 0.65}``.
        cost: metric -> ``{"plan": x, "base": y, "fraction": x / y}``.
        solver: status, bound, gap, seconds.
        provenance: utilities, workload, scope, device, planner version.
    """

    model: str
    fingerprint: str
    layers: int
    layers_off: tuple[int, ...] = ()
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    mlp: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    mlp_switches: Mapping[int, int] = field(default_factory=dict)
    tokens: tuple[TokenStage, ...] = ()
    budget: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    solver: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether everything stays on."""
        return not (self.layers_off or self.heads or self.mlp or self.tokens)
