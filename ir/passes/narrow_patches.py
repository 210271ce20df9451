"""Narrow patches: fewer patches from some layer of the vision tower on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from planner.ir.dims import Dim
from planner.ir.graph import Graph, Operator
from planner.ir.structure import redirected
from planner.ir.vision_tower import PatchStage, VisionTower


@dataclass(frozen=True)
class NarrowPatches:
    """Select patches before some layers of the vision tower; all that is behind sees those alone.

    That includes the projector. A CLS token always stays.
    """

    stages: tuple[PatchStage, ...]  # in layer order, each keeping fewer than the one before
    name: ClassVar[str] = "narrow-patches"

    def apply(self, graph: Graph) -> Graph:
        """The graph with ``select_tokens`` operators in its tower, and smaller shapes.

        InputError where patches cannot be dropped inside the tower, or not at these layers.
        """
        tower = VisionTower.of(graph)
        tower.check(self.stages)
        for stage in self.stages:
            graph = _narrow(graph, tower, stage)
            tower = replace(tower, patches=stage.keep)
        return graph


def _narrow(graph: Graph, tower: VisionTower, stage: PatchStage) -> Graph:
    """The graph with one stage of a tower in which so many patches are left."""
    new = partial(Operator, part="vision", layer=stage.layer)
    first = next(n for n, o in enumerate(graph) if (o.part, o.layer) == ("vision", stage.layer))
    before, behind = graph.operators[:first], graph.operators[first:]
    known = {o.name: o for o in before if o.part == "vision" and o.layer is not None}
    crossing = tuple(dict.fromkeys(n for o in behind for n in o.inputs if n in known))
    runs = Dim(0, (("images", tower.runs),))
    scores = [
        new(
            f"patches.{stage.layer}.score_{number}",
            "matmul",
            crossing,
            (runs, Dim(rows), Dim(columns)),
        ).having(inner=inner)
        for number, (rows, columns, inner) in enumerate(stage.products)
    ]
    read = tuple(score.name for score in scores)
    selected = [
        new(
            f"patches.{stage.layer}" + (f"_{number}" if number else ""),
            "select_tokens",
            (name, *read),
            known[name].shape,
        ).having(before=tower.tokens, keep=stage.keep, of=tower.patches, score_width=0)
        for number, name in enumerate(crossing)
    ]
    sources = {name: chosen.name for name, chosen in zip(crossing, selected, strict=True)}
    left = replace(tower, patches=stage.keep)
    sizes = {Dim(tower.patches): Dim(left.patches), Dim(tower.tokens): Dim(left.tokens)}
    rest = [_narrowed(o, sizes) for o in (*selected, *redirected(behind, sources))]
    return graph.replacing([*before, *scores, *rest])


def _narrowed(operator: Operator, sizes: Mapping[Dim, Dim]) -> Operator:
    """An operator in front of the decoder with fewer tokens, any other as it is."""
    if operator.part not in ("vision", "projector") or len(operator.shape) < 2:
        return operator
    *leading, tokens, width = operator.shape
    narrow = replace(operator, shape=(*leading, sizes.get(tokens, tokens), width))
    if operator.kind == "attention":
        keys = Dim.of(operator["keys"])
        narrow = narrow.having(keys=sizes.get(keys, keys).constant)
    return narrow
