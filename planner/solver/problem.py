"""The optimisation problem that a budget poses: what each choice is worth and what it costs.

A `Problem` knows nothing of graphs, devices or weights: integer costs, real utilities, integer
limits. `planner.planning.pricing` builds it from a Graph, the solvers beside this file solve it,
and the scheduler and the audit use the same object, so "feasible" means one thing everywhere.

Choices: one token option; for every layer, on or off; for every site of a layer that is on, which
switches are kept. Switches of one site cost the same, so a site's cost depends on how many are
kept, by a table - it need not be linear (a roofline is not). Token counts change every cost, so
all tables have the token option as first axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from planner.ir.errors import InputError

Ints = npt.NDArray[np.int64]
Costs = Ints
Floats = npt.NDArray[np.float64]
# A choice, in the form of labels and logits, has one per switch, shape (switches,), by layer: the
# layer's own, where it can be off, then those of its sites.
Flags = npt.NDArray[np.bool_]

# Sums of costs must stay exact in 64-bit integers, with room for one doubling.
COST_CEILING = 1 << 61


@dataclass(frozen=True, eq=False)
class SiteChoices:
    """Switches of one attention block or MLP.

    `costs` of keeping n switches are non-negative and non-decreasing in n.
    """

    name: str  # the site's name in the Graph; unique in the Problem
    utilities: Floats  # (switches,): worth of keeping each; may be negative
    costs: Costs  # (token options, metrics, switches + 1)
    minimum: int = 0  # fewest switches kept while the layer is on

    @property
    def switches(self) -> int:
        """Number of switches."""
        return len(self.utilities)


@dataclass(frozen=True, eq=False)
class LayerChoices:
    """One layer: on (with its sites) or off.

    `utility` and `costs` are of the layer being on, its sites not included.
    """

    name: str  # the layer site's, or a name of its own where the layer cannot be switched
    utility: float
    costs: Costs  # (token options, metrics), non-negative
    sites: tuple[SiteChoices, ...] = ()
    optional: bool = True  # whether it may be off


@dataclass(frozen=True, eq=False)
class TokenOption:
    """One way to set all token stages.

    `costs` are of everything outside the layers: vision encoder, projector, lm_head, ...
    """

    keep: tuple[int, ...]  # image tokens kept after each stage, non-increasing
    utility: float
    costs: Costs  # (metrics,), non-negative
    # (layers,): what a layer that is off loses with this option besides what it loses by itself
    layer_losses: Floats | None = None


@dataclass(frozen=True)
class Pair:
    """Two layers or sites that are worth together what neither is worth alone."""

    first: str  # name of a layer, or of a site, which is off if it keeps no switch
    second: str
    # Utility lost when both are off, besides what each loses by itself; below 0 where one makes up
    # for the other's loss.
    loss: float


@dataclass(frozen=True, eq=False)
class Problem:
    """Maximise utility with every metric's cost within its limit."""

    metrics: tuple[str, ...]  # names, for messages
    limits: Costs  # (metrics,)
    tokens: tuple[TokenOption, ...]  # at least one
    layers: tuple[LayerChoices, ...]  # in model order
    pairs: tuple[Pair, ...] = ()  # of layers and sites

    @property
    def is_additive(self) -> bool:
        """Whether nothing is worth more together than alone."""
        return not self.pairs and all(token.layer_losses is None for token in self.tokens)

    def additive(self) -> Problem:
        """The problem without what things are worth together."""
        tokens = tuple(replace(token, layer_losses=None) for token in self.tokens)
        return replace(self, tokens=tokens, pairs=())

    @property
    def sites(self) -> tuple[SiteChoices, ...]:
        """All sites, in model order."""
        return tuple(site for layer in self.layers for site in layer.sites)

    @property
    def switches(self) -> int:
        """Number of layer, head and MLP switches."""
        return sum(layer.optional + sum(s.switches for s in layer.sites) for layer in self.layers)

    def cost(self, choice: Choice) -> Costs:
        """Cost of a choice per metric, recomputed from the tables; shape (metrics,)."""
        option = choice.token_option
        total = self.tokens[option].costs.astype(np.int64).copy()
        for layer, on in zip(self.layers, choice.layers_on, strict=True):
            if not on:
                continue
            total += layer.costs[option]
            for site in layer.sites:
                total += site.costs[option, :, len(choice.kept[site.name])]
        return total

    def utility(self, choice: Choice) -> float:
        """Utility of a choice, recomputed from the tables; the correctly rounded sum."""
        token = self.tokens[choice.token_option]
        by_layer = list(zip(self.layers, choice.layers_on, strict=True))
        terms = [token.utility, *(layer.utility for layer, on in by_layer if on)]
        for site in self.sites:
            terms += site.utilities[list(choice.kept[site.name])].tolist()
        layers_off = {layer.name for layer, on in by_layer if not on}
        off = layers_off | {site.name for site in self.sites if not choice.kept[site.name]}
        terms += [-pair.loss for pair in self.pairs if {pair.first, pair.second} <= off]
        if token.layer_losses is not None:
            losses = zip(self.layers, token.layer_losses.tolist(), strict=True)
            terms += [-loss for layer, loss in losses if layer.name in layers_off]
        return math.fsum(terms)

    def is_feasible(self, choice: Choice) -> bool:
        """Whether a choice is one of this problem's and respects every limit and every minimum."""
        if not 0 <= choice.token_option < len(self.tokens):
            return False
        if len(choice.layers_on) != len(self.layers):
            return False
        for layer, on in zip(self.layers, choice.layers_on, strict=True):
            if not on and not layer.optional:
                return False
            for site in layer.sites:
                kept = choice.kept.get(site.name)
                if kept is None or len(set(kept)) != len(kept):
                    return False
                if kept and not 0 <= min(kept) <= max(kept) < site.switches:
                    return False
                if (on and len(kept) < site.minimum) or (not on and kept):
                    return False
        return bool((self.cost(choice) <= self.limits).all())

    @property
    def switch_names(self) -> tuple[str, ...]:
        """``layer.3`` for a layer's own switch, ``heads.3[0]`` for one of a site; as in `Flags`."""
        names: list[str] = []
        for layer in self.layers:
            if layer.optional:
                names.append(layer.name)
            for site in layer.sites:
                names += [f"{site.name}[{index}]" for index in range(site.switches)]
        return tuple(names)

    def choice_of(self, flags: Sequence[bool] | Flags, token_option: int = 0) -> Choice:
        """What flags, shape (switches,), say; in layers that are off, everything is off."""
        on: list[bool] = []
        kept: dict[str, tuple[int, ...]] = {}
        row, place = np.asarray(flags, dtype=np.bool_), 0
        for layer in self.layers:
            on.append(bool(row[place]) if layer.optional else True)
            place += layer.optional
            for site in layer.sites:
                here = row[place : place + site.switches]
                kept[site.name] = tuple(np.flatnonzero(here).tolist()) if on[-1] else ()
                place += site.switches
        return Choice(token_option, tuple(on), kept)

    def flags_of(self, choice: Choice) -> Flags:
        """A choice as flags, shape (switches,); its token option is left out."""
        parts: list[Flags] = [np.zeros(0, dtype=np.bool_)]
        for layer, on in zip(self.layers, choice.layers_on, strict=True):
            if layer.optional:
                parts.append(np.array([on]))
            for site in layer.sites:
                row = np.zeros(site.switches, dtype=np.bool_)
                row[list(choice.kept[site.name])] = True
                parts.append(row)
        return np.concatenate(parts)

    def with_utilities(self, utilities: Floats) -> Problem:
        """The problem with other utilities, shape (switches,); layers always on are worth 0."""
        if utilities.shape != (self.switches,):
            raise InputError(f"{utilities.size} utilities for {self.switches} switches")
        layers, place = [], 0
        for layer in self.layers:
            worth = float(utilities[place]) if layer.optional else 0.0
            place += layer.optional
            sites = []
            for site in layer.sites:
                sites.append(replace(site, utilities=utilities[place : place + site.switches]))
                place += site.switches
            layers.append(replace(layer, utility=worth, sites=tuple(sites)))
        return replace(self, layers=tuple(layers))

    def smallest_costs(self) -> Costs:
        """Cost of the cheapest choice of every token option; shape (token options, metrics).

        Costs never fall when something is kept, so one choice is the cheapest in all metrics.
        """
        total = np.stack([token.costs for token in self.tokens]).astype(np.int64)
        for layer in self.layers:
            if not layer.optional:
                total += layer.costs
                for site in layer.sites:
                    total += site.costs[:, :, site.minimum]
        return total

    def check(self) -> None:
        """Raise InputError, naming the first table that breaks what the fields above promise."""
        options, metrics = len(self.tokens), len(self.metrics)
        if options == 0:
            raise InputError("the problem has no token option")
        _check_table("the limits", self.limits, (metrics,), signed=True)
        names = [site.name for site in self.sites]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"two sites of the problem have the name {twice!r}")
        for token in self.tokens:
            _check_table(f"the costs of token option {token.keep}", token.costs, (metrics,))
            _check_finite(f"the utility of token option {token.keep}", token.utility)
            losses = token.layer_losses
            if losses is None:
                continue
            if losses.shape != (len(self.layers),) or not np.isfinite(losses).all():
                raise InputError(
                    f"the layer losses of token option {token.keep} are not "
                    f"{len(self.layers)} finite numbers"
                )
        for layer in self.layers:
            _check_table(f"the costs of layer {layer.name}", layer.costs, (options, metrics))
            _check_finite(f"the utility of layer {layer.name}", layer.utility)
            for site in layer.sites:
                _check_site(site, options, metrics)
        units = {*names, *(layer.name for layer in self.layers)}
        for pair in self.pairs:
            _check_finite(f"the loss of {pair.first} with {pair.second}", pair.loss)
            if pair.first == pair.second or not {pair.first, pair.second} <= units:
                raise InputError(f"{pair.first} and {pair.second} are no two layers or sites")
        if len(units) < len(names) + len(self.layers) and self.pairs:
            raise InputError("pairs need layers and sites of different names")
        tables = [np.stack([token.costs for token in self.tokens])]
        tables += [layer.costs for layer in self.layers]
        tables += [site.costs[:, :, -1] for site in self.sites]
        for index, metric in enumerate(self.metrics):
            total = sum(int(table[:, index].max()) for table in tables)
            if total >= COST_CEILING:
                raise InputError(f"the costs of metric {metric} add up to {total}, beyond 2^61")


@dataclass(frozen=True)
class Choice:
    """An answer to a Problem; `kept` is empty for sites of layers that are off."""

    token_option: int  # index into ``Problem.tokens``
    layers_on: tuple[bool, ...]
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)  # site -> switches, ascending

    @staticmethod
    def everything(problem: Problem, token_option: int = 0) -> Choice:
        """The base model: all switches on."""
        return Choice(
            token_option,
            tuple(True for _ in problem.layers),
            {site.name: tuple(range(site.switches)) for site in problem.sites},
        )


def ranked(utilities: Floats) -> list[int]:
    """Switches, the most useful first; ties go to the lower index."""
    order: list[int] = np.argsort(-utilities, kind="stable").tolist()
    return order


def top(utilities: Floats, count: int) -> tuple[int, ...]:
    """The `count` most useful switches, ascending; ties go to the lower index."""
    return tuple(sorted(ranked(utilities)[:count]))


def _check_site(site: SiteChoices, options: int, metrics: int) -> None:
    what = f"the costs of site {site.name}"
    _check_table(what, site.costs, (options, metrics, site.switches + 1))
    if (site.costs[:, :, 1:] < site.costs[:, :, :-1]).any():
        raise InputError(f"{what} fall when a switch is added")
    if not np.isfinite(site.utilities).all():
        raise InputError(f"a utility of site {site.name} is not a finite number")
    if not 0 <= site.minimum <= site.switches:
        raise InputError(
            f"the minimum of site {site.name} is {site.minimum}, not between 0 and {site.switches}"
        )


def _check_table(what: str, table: Costs, shape: tuple[int, ...], signed: bool = False) -> None:
    if table.dtype != np.int64:
        raise InputError(f"{what} are {table.dtype}, not int64")
    if table.shape != shape:
        raise InputError(f"{what} have shape {table.shape}, not {shape}")
    if not signed and (table < 0).any():
        raise InputError(f"{what} include a negative one")


def _check_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise InputError(f"{what} is not a finite number")
