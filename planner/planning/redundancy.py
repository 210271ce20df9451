"""What is lost together, made such that leaving out more never loses less.

Interactions are measured on a few samples, two at a time. Where one makes up for another's loss
they are negative, and several of them may add up to more than a layer is worth: a plan would then
leave out what the budget allows to keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from planner.solver.problem import LayerChoices

# A layer or site keeps this share of its worth, whatever else is off.
_OWN = 0.1


Losses = npt.NDArray[np.float64]


def without_gains(
    layers: Sequence[LayerChoices],
    pairs: Mapping[tuple[str, str], float],
    with_tokens: Sequence[Losses | None],
) -> tuple[dict[tuple[str, str], float], list[Losses | None]]:
    """Pairs' losses and, by token option, the layers' losses besides, shape (layers,).

    Negative ones are scaled down as far as it takes for every layer, and every site, to be worth
    something whatever else is off. All others stay as they are.
    """
    layer_of = {site.name: layer.name for layer in layers for site in layer.sites}
    inside = {
        names: loss
        for names, loss in pairs.items()
        if layer_of.get(names[0], "") == layer_of.get(names[1]) != ""
    }
    across = {names: loss for names, loss in pairs.items() if names not in inside}
    alone = {s.name: max(0.0, float(s.utilities.sum())) for x in layers for s in x.sites}
    made = _scaled(inside, alone, {})
    for layer in layers:
        sites = float(sum(site.utilities.sum() for site in layer.sites))
        own = [loss for names, loss in made.items() if layer_of[names[0]] == layer.name]
        alone[layer.name] = max(0.0, layer.utility + sites + sum(own))
    known = [losses for losses in with_tokens if losses is not None]
    lowest = np.minimum(0.0, known).min(0) if known else np.zeros(len(layers))
    beside = {layer.name: -float(gain) for layer, gain in zip(layers, lowest, strict=True)}
    factors = np.array([_factor(layer.name, across, alone, beside) for layer in layers])
    return (
        made | _scaled(across, alone, beside),
        [None if k is None else np.where(k < 0, k * factors, k) for k in with_tokens],
    )


def _scaled(
    pairs: Mapping[tuple[str, str], float], alone: Mapping[str, float], beside: Mapping[str, float]
) -> dict[tuple[str, str], float]:
    names = {name for pair in pairs for name in pair}
    factors = {name: _factor(name, pairs, alone, beside) for name in names}
    return {
        pair: loss * min(factors[name] for name in pair) if loss < 0 else loss
        for pair, loss in pairs.items()
    }


def _factor(
    name: str,
    pairs: Mapping[tuple[str, str], float],
    alone: Mapping[str, float],
    beside: Mapping[str, float],
) -> float:
    """What all gains of one name are scaled by."""
    gains = beside.get(name, 0.0)
    gains -= sum(loss for pair, loss in pairs.items() if name in pair and loss < 0)
    most = (1 - _OWN) * alone[name]
    return 1.0 if gains <= most else most / gains
