"""Passes: Graph in, Graph out, verified after each.

A pass is a frozen dataclass with a ``name`` and ``apply(graph) -> graph``; its fields are its
arguments. In the usual order:

    specialise        leave out the layers, heads and neurons that a plan switches off
    narrow_patches    fewer patches from some layer of the vision tower on
    narrow_tokens     fewer image tokens from some decoder layer on
    drop_dead         drop what no output needs
    fuse_projections  linears that read the same input become one
    fuse_norm         a norm goes into the linear after it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Protocol

from planner.ir.errors import check_known
from planner.ir.graph import Graph
from planner.ir.passes.drop_dead import DropDead
from planner.ir.passes.fuse_norm import FuseNorm
from planner.ir.passes.fuse_projections import FuseProjections
from planner.ir.passes.narrow_patches import NarrowPatches
from planner.ir.passes.narrow_tokens import NarrowTokens
from planner.ir.passes.specialise import Specialise
from planner.ir.verify import verify

__all__ = [
    "PASSES",
    "DropDead",
    "FuseNorm",
    "FuseProjections",
    "NarrowPatches",
    "NarrowTokens",
    "Pass",
    "Specialise",
    "find_passes",
    "run",
]


class Pass(Protocol):
    """What every pass has."""

    @property
    def name(self) -> str:
        """As users write it."""

    def apply(self, graph: Graph) -> Graph:
        """The rewritten graph; the given one is left as it is."""


# Name -> class.
PASSES: dict[str, Callable[..., Pass]] = {
    "specialise": Specialise,
    "narrow-patches": NarrowPatches,
    "narrow-tokens": NarrowTokens,
    "drop-dead": DropDead,
    "fuse-projections": FuseProjections,
    "fuse-norm": FuseNorm,
}


def find_passes(names: str) -> list[Pass]:
    """Passes without arguments, from their names with commas between; InputError lists those."""
    known = {name: made for name, made in PASSES.items() if not signature(made).parameters}
    chosen = names.split(",") if names else []
    for name in chosen:
        check_known("pass", name, known)
    return [known[name]() for name in chosen]


def run(
    graph: Graph,
    passes: Iterable[Pass],
    print_between: Callable[[str, Graph], None] | None = None,
) -> Graph:
    """Apply passes to a verified Graph in order, verifying after each.

    `print_between` is called with each pass's name and the graph it left. InputError where a pass's
    arguments do not fit the graph.
    """
    for step in passes:
        graph = step.apply(graph)
        verify(graph)
        if print_between is not None:
            print_between(step.name, graph)
    return graph
