"""What is lost together, such that no set of layers is lost at a gain.

Interactions are measured two at a time, on a few samples. Where one layer makes up for another's
loss they are negative, and many of them may add up to more than the layers are worth, which cannot
be: a divergence from the base model is never below 0. A plan would then leave out what its budget
allows to keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planner.solver.problem import Flags, Floats, LayerChoices

# What is lost with a set is at least this share of what its members lose alone, added up.
_LEAST = 0.1
# Every set of so many units is looked at.
_EVERY_SET = 12
# A set that breaks this by less is left.
_TOLERANCE = 1e-9


def without_gains(
    layers: Sequence[LayerChoices],
    pairs: Mapping[tuple[str, str], float],
    with_tokens: Sequence[Floats | None],
) -> tuple[dict[tuple[str, str], float], list[Floats | None]]:
    """Pairs' losses and, by token option, the layers' losses besides, shape (layers,).

    Of few units that interact every set is looked at; of more, sets that would be lost at a gain
    are looked for by local search, from every unit, every two and all of them. The negative
    interactions inside one are scaled down together. All others stay as they were measured.
    """
    layer_of = {site.name: layer.name for layer in layers for site in layer.sites}
    alone = {s.name: max(0.0, float(s.utilities.sum())) for x in layers for s in x.sites}
    made = {}
    for (one, other), loss in pairs.items():
        if layer_of.get(one, "") == layer_of.get(other) != "":
            made[one, other] = max(loss, -(1 - _LEAST) * (alone[one] + alone[other]))
    for layer in layers:
        inside = [loss for (one, _), loss in made.items() if layer_of[one] == layer.name]
        sites = sum(float(site.utilities.sum()) for site in layer.sites)
        alone[layer.name] = max(0.0, layer.utility + sites + sum(inside))
    names = [*(layer.name for layer in layers), *layer_of]
    number = {name: index for index, name in enumerate(names)}
    interactions = _Interactions(np.array([alone[name] for name in names]))
    across = [pair for pair in pairs if pair not in made]
    for one, other in across:
        interactions.together[number[one], number[other]] += pairs[one, other]
        interactions.together[number[other], number[one]] += pairs[one, other]
    scaled = [interactions.scaled(losses) for losses in (*with_tokens, None)][:-1]
    for one, other in across:
        made[one, other] = float(interactions.together[number[one], number[other]])
    return made, scaled


@dataclass
class _Interactions:
    """What n units lose alone, (n,), and what each two of them lose besides, (n, n)."""

    alone: Floats

    def __post_init__(self) -> None:
        self.together = np.zeros((len(self.alone), len(self.alone)))

    def scaled(self, beside: Floats | None) -> Floats | None:
        """What the first units lose besides, scaled; pairs are scaled in place."""
        linear = np.zeros_like(self.alone)
        if beside is not None:
            linear[: len(beside)] = beside
        while True:
            found = self._worst(linear)
            chosen = np.outer(found, found)
            pair_gains = np.where(chosen & (self.together < 0), self.together, 0.0)
            gains = np.where(found & (linear < 0), linear, 0.0)
            total = float(pair_gains.sum() / 2 + gains.sum())
            # What the set loses, less what it has to.
            excess = float(found @ ((1 - _LEAST) * self.alone + linear))
            excess += float(found @ self.together @ found) / 2
            if excess >= -_TOLERANCE * (1 + self.alone.max(initial=0.0)) or not total:
                return None if beside is None else linear[: len(beside)]
            share = max(0.0, 1 - excess / total)
            self.together += (share - 1) * pair_gains
            linear += (share - 1) * gains

    def _worst(self, linear: Floats) -> Flags:
        """The set that loses least beside what it has to: of all sets, or as search finds it."""
        own = (1 - _LEAST) * self.alone + linear
        # What costs by itself and interacts with nothing is in no such set.
        some = (np.any(self.together, axis=0) | (own < 0)).nonzero()[0]
        own, together = own[some], self.together[np.ix_(some, some)]
        count = len(own)
        if count <= _EVERY_SET:
            sets = (np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(np.float64)
        else:
            sets = _searched(own, together)
        values = sets @ own + ((sets @ together) * sets).sum(1) / 2
        worst = np.zeros(len(self.alone), dtype=np.bool_)
        worst[some] = sets[values.argmin()].astype(bool)
        return worst


def _searched(own: Floats, together: Floats) -> Floats:
    """Sets that no change of one unit makes worth less, shape (sets, units)."""
    count = len(own)
    single = np.eye(count)
    one, other = np.triu_indices(count, 1)
    sets = np.vstack([single, single[one] + single[other], np.ones(count)])
    for _ in range(2 * count):
        change = (1 - 2 * sets) * (own + sets @ together)
        best = change.argmin(1)
        improves = change[np.arange(len(sets)), best] < 0
        if not improves.any():
            break
        rows = improves.nonzero()[0]
        sets[rows, best[rows]] = 1 - sets[rows, best[rows]]
    return sets
