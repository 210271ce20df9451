"""Widths of a model's attention that the work of choosing tokens depends on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from planner.ir.dims import Dim
from planner.ir.graph import Graph, Operator
from planner.ir.structure import tiles
from planner.plan import Plan


@dataclass(frozen=True, eq=False)
class AttentionWidths:
    """What selectors are told of attention: how many features queries and keys have."""

    graph: Graph

    @cached_property
    def _tower(self) -> Operator | None:
        """The tower's first attention."""
        attentions = (o for o in self.graph if o.kind == "attention")
        return next((o for o in attentions if o.part == "vision"), None)

    @cached_property
    def _decoder(self) -> dict[int, Operator]:
        """The first attention of every decoder layer that has any."""
        found: dict[int, Operator] = {}
        for operator in self.graph:
            layer, kind = operator.layer, (operator.part, operator.kind)
            if layer is not None and kind == ("decoder", "attention"):
                found.setdefault(layer, operator)
        return found

    def of_tower(self, image_tokens: int) -> tuple[int, int, int]:
        """(width, heads, queries that rank patches) of the tower's attention, see `Sizes`.

        `image_tokens`: of one run; as many queries rank where there is no CLS token.
        """
        attention = self._tower
        if attention is None:
            return 0, 1, 1
        heads, (_, patches) = attention.integer("heads"), tiles(self.graph)
        has_cls = attention.shape[-2] != Dim(patches)
        return heads * attention.integer("head_dim"), heads, 1 if has_cls else image_tokens

    def near(self, stage: int) -> tuple[int, int]:
        """(query, key) features of the attention nearest to a stage; (0, 0) without one."""
        for attention in self._attentions(
            *range(stage - 1, -1, -1), *range(stage, self.graph.layers)
        ):
            width = attention.integer("head_dim")
            return attention.integer("heads") * width, attention.integer("kv_heads") * width
        return 0, 0

    def of_queries(self, stage: int, plan: Plan | None) -> int:
        """Query features that a plan leaves of the last attention before a stage; 0 without one."""
        for attention in self._attentions(*range(stage - 1, -1, -1)):
            width = attention.integer("heads") * attention.integer("head_dim")
            site = self.graph.sites_by_name.get(f"heads.{attention.layer}")
            if plan is None or site is None:
                return width
            kept = plan.kept(site)
            if not kept.nothing:
                return width // site.lanes * kept.count
        return 0

    def _attentions(self, *layers: int) -> Iterable[Operator]:
        return (self._decoder[layer] for layer in layers if layer in self._decoder)
