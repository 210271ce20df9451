"""Sites of a captured graph: which it computes, and which those are in the call at hand.

TorchDynamo compiles code once for all modules that run it: layers that are compiled by themselves,
or cut in pieces by a graph break, share their graphs, as models of one class do. So the parameters
that a graph is called with say whose part of a plan it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planner.backend.plan_tensors import PlanTensor, PlanTensors

_SHARED = "its graph was captured from another layer, which cannot be narrowed there"


@dataclass(frozen=True, eq=False)
class SitesHere:
    """What a call of a captured graph computes."""

    tensors: tuple[PlanTensor, ...]  # what the graph is given
    # Name of a site that the graph cannot narrow -> why.
    whole: Mapping[str, str]
    fits: bool  # whether the graph may be run at all; else only where nothing of it is narrowed


@dataclass(frozen=True, eq=False)
class CapturedSites:
    """The sites of a graph as it was captured."""

    # Of the graph's inputs, those that are parameters.
    parameters: tuple[int, ...]
    # Place of an input -> the site that the graph narrows, where that input is kept the weight of
    # the site's last linear.
    narrowed: Mapping[int, str]
    whole: Mapping[str, str]  # a site that it computes and cannot narrow -> why
    tensors: tuple[PlanTensor, ...]  # that it was compiled for
    _known: dict[tuple[str | None, ...], SitesHere] = field(default_factory=dict)

    def here(self, plans: PlanTensors, inputs: Sequence[Any]) -> SitesHere:
        """What the graph computes when it is called with these inputs, for some model's plans."""
        names = self._names(plans, inputs)
        if any(name is None for place, name in names.items() if place in self.narrowed):
            # Parameters were exchanged.
            plans.look_again()
            names = self._names(plans, inputs)
        key = tuple(names.values())
        if key not in self._known:
            self._known[key] = self._resolved(names)
        return self._known[key]

    def _names(self, plans: PlanTensors, inputs: Sequence[Any]) -> dict[int, str | None]:
        return {place: plans.site_of(inputs[place]) for place in self.parameters}

    def _resolved(self, names: Mapping[int, str | None]) -> SitesHere:
        whole = {
            name: self.whole.get(name, _SHARED)
            for place, name in names.items()
            if name is not None and place not in self.narrowed
        }
        meant = {captured: names[place] for place, captured in self.narrowed.items()}
        fits = (
            all(_kind(a) == _kind(b) for a, b in meant.items() if b) and None not in meant.values()
        )
        if not fits:
            every = {name for name in meant.values() if name is not None}
            return SitesHere((), whole | dict.fromkeys(every, _SHARED), False)
        return SitesHere(tuple(_moved(tensor, meant) for tensor in self.tensors), whole, True)


def _moved(tensor: PlanTensor, meant: Mapping[str, str | None]) -> PlanTensor:
    """The tensor of the site that is meant instead."""
    name = meant.get(tensor.name) or tensor.name
    return replace(tensor, layer=int(name.partition(".")[2]))


def _kind(name: str | None) -> str:
    return (name or "").partition(".")[0]
