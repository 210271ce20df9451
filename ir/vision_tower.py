"""The vision tower of a Graph, as far as patches can be dropped between its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import Graph
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


def _unfit(graph: Graph, what: str) -> InputError:
    return InputError(
        f"'{graph.name}' {what}, so patches cannot be dropped inside; use a selector that works "
        f"in the decoder, such as fastv"
    )
