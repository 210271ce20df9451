"""A choice as one row of flags, one per switch: the form in which labels and logits hold it.

Switches go by layer: the layer's own, where it can be off, then those of its sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from planner.planning.problem import Choice, Problem

__all__ = ["choice_of", "flags_of", "switch_names", "with_utilities"]

Flags = npt.NDArray[np.bool_]


def switch_names(problem: Problem) -> tuple[str, ...]:
    """``layer.3`` for a layer's own switch, ``heads.3[0]`` for one of a site."""
    names: list[str] = []
    for layer in problem.layers:
        if layer.optional:
            names.append(layer.name)
        for site in layer.sites:
            names += [f"{site.name}[{index}]" for index in range(site.switches)]
    return tuple(names)


def choice_of(problem: Problem, flags: Sequence[bool] | Flags, token_option: int = 0) -> Choice:
    """What flags, shape (switches,), say; in layers that are off, everything is off."""
    on: list[bool] = []
    kept: dict[str, tuple[int, ...]] = {}
    row, place = np.asarray(flags, dtype=np.bool_), 0
    for layer in problem.layers:
        on.append(bool(row[place]) if layer.optional else True)
        place += layer.optional
        for site in layer.sites:
            here = row[place : place + site.switches]
            kept[site.name] = tuple(np.flatnonzero(here).tolist()) if on[-1] else ()
            place += site.switches
    return Choice(token_option, tuple(on), kept)


def flags_of(problem: Problem, choice: Choice) -> Flags:
    """A choice as flags, shape (switches,); its token option is left out."""
    parts: list[npt.NDArray[np.bool_]] = [np.zeros(0, dtype=np.bool_)]
    for layer, on in zip(problem.layers, choice.layers_on, strict=True):
        if layer.optional:
            parts.append(np.array([on]))
        for site in layer.sites:
            row = np.zeros(site.switches, dtype=np.bool_)
            row[list(choice.kept[site.name])] = True
            parts.append(row)
    return np.concatenate(parts)


def with_utilities(problem: Problem, utilities: npt.NDArray[np.float64]) -> Problem:
    """The problem with other utilities, shape (switches,); layers always on are worth 0."""
    layers, place = [], 0
    for layer in problem.layers:
        worth = float(utilities[place]) if layer.optional else 0.0
        place += layer.optional
        sites = []
        for site in layer.sites:
            sites.append(replace(site, utilities=utilities[place : place + site.switches]))
            place += site.switches
        layers.append(replace(layer, utility=worth, sites=tuple(sites)))
    return replace(problem, layers=tuple(layers))
