"""The vision side of a Graph: its tower, as far as patches can be dropped between the layers, and
its projector, as far as they can be dropped before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Operator
from planner.ir.structure import needed, tiles


class PatchStage(Protocol):
    """A choice of patches before a layer of the vision tower."""

    @property
    def layer(self) -> int:
        """The first layer of the tower that sees the smaller set."""

    @property
    def keep(self) -> int:
        """Patches kept, of each run of the tower."""

    @property
    def products(self) -> Sequence[tuple[int, int, int]]:
        """(rows, columns, inner size) of what choosing them multiplies, in each run."""


@dataclass(frozen=True)
class VisionTower:
    """A stack of layers that all see the same tokens, one of which ends in the image features."""

    layers: int  # the first so many make the features; those behind run for nothing
    patches: int  # of one run
    has_cls: bool  # whether a CLS token stands in front of them
    runs: int  # of the tower, for one image
    width: int  # of its attention, heads * head_dim

    @property
    def tokens(self) -> int:
        """Of one run."""
        return self.patches + self.has_cls

    @staticmethod
    def of(graph: Graph) -> VisionTower:
        """The tower of a graph; InputError where patches cannot be dropped between its layers."""
        layers = [o for o in graph if o.part == "vision" and o.layer is not None]
        attention = next((o for o in layers if o.kind == "attention"), None)
        if attention is None or not any(o.part == "projector" for o in graph):
            raise _unfit(graph, "has no vision tower with a projector behind it")
        inside = {o.name: o.layer for o in layers}
        readers = [graph.by_name[name] for name in needed(graph) - inside.keys()]
        ends = {name for reader in readers for name in reader.inputs if name in inside}
        if len(ends) != 1:
            raise _unfit(graph, "makes image features of several layers of its vision tower")
        counts, (runs, patches) = {o.shape[-2] for o in layers}, tiles(graph)
        if counts != {Dim(patches)} and counts != {Dim(patches + 1)}:
            raise _unfit(graph, "does not make one token of each patch that all of its layers see")
        return VisionTower(
            layers=1 + (inside[ends.pop()] or 0),
            patches=patches,
            has_cls=counts == {Dim(patches + 1)},
            runs=runs,
            width=attention.integer("heads") * attention.integer("head_dim"),
        )

    def check(self, stages: Sequence[PatchStage]) -> None:
        """Raise InputError unless patches become fewer at ascending layers of the tower."""
        layer, left = 0, self.patches
        for stage in stages:
            if not layer < stage.layer < self.layers or not 0 < stage.keep <= left:
                raise InputError(
                    f"patches must become fewer at ascending layers from 1 to {self.layers - 1} of "
                    f"the vision tower: {stage.keep} of {left} before layer {stage.layer} cannot be"
                )
            layer, left = stage.layer, stage.keep


@dataclass(frozen=True)
class Projector:
    """What makes image features of those that the vision tower computes."""

    module: str  # path of the innermost module that holds it
    source: Operator  # of the vision side: what it is given
    merges: bool  # whether it computes anything whose rows are not the patches that it makes

    @staticmethod
    def of(graph: Graph) -> Projector:
        """The projector of a graph; InputError where none is behind a vision tower."""
        operators = [o for o in graph if o.part == "projector" and o.module]
        path = common(o.module for o in operators if o.kind == "linear")
        inside = [o for o in operators if o.module == path or o.module.startswith(f"{path}.")]
        sources = [graph.by_name[name] for o in inside for name in o.inputs]
        source = next((o for o in sources if o.part == "vision"), None)
        if not path or source is None:
            raise InputError(
                f"'{graph.name}' has no projector behind its vision tower; use a selector that "
                "works in the decoder, such as fastv"
            )
        return Projector(path, source, len({str(o.shape[:-1]) for o in inside}) > 1)

    def is_given_cls(self, graph: Graph) -> bool | None:
        """Whether it comes from a CLS token and patches; None where not even from patches alone."""
        _, patches = tiles(graph)
        tokens = self.source.shape[-2]
        return None if tokens not in (Dim(patches), Dim(patches + 1)) else tokens != Dim(patches)


def ranking_attention(
    graph: Graph, layer: int, selector: str
) -> tuple[Operator, Operator, Operator]:
    """(attention, its query's product, its key's) of a layer of the vision tower, -1 the last.

    InputError where the tower does not compute them one by one, so that `selector` cannot rank.
    """
    attention = sorted(
        (o for o in graph if o.part == "vision" and o.kind == "attention"),
        key=lambda operator: operator.layer or 0,
    )
    if not -len(attention) <= layer < len(attention):
        raise InputError(
            f"{selector} ranks by attention in layer {layer} of the vision tower, and this one "
            f"attends in {len(attention)} of them"
        )
    chosen = attention[layer]
    query, key = (graph.by_name[name] for name in chosen.inputs[:2])
    if query.kind != "linear" or key.kind != "linear" or query is key:
        raise InputError(
            f"{selector} ranks by the vision tower's queries and keys, which this tower does not "
            "compute separately"
        )
    return chosen, query, key


def common(paths: Iterable[str]) -> str:
    """The innermost module that holds all of them."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))


def _unfit(graph: Graph, what: str) -> InputError:
    return InputError(
        f"'{graph.name}' {what}, so patches cannot be dropped inside; use a selector that works "
        f"in the decoder, such as fastv"
    )
