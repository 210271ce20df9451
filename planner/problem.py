"""The optimisation problem that a budget poses: what each choice is worth and what it costs.

A `Problem` knows nothing of graphs, devices or weights: integer costs, real utilities, integer
limits. `planner.pricing` builds it from a Graph; `planner.solver` solves it; the scheduler and the
audit use the same object, so "feasible" means one thing everywhere.

Choices: one token option; for every layer, on or off; for every site of a layer that is on, which
switches are kept. Switches of one site cost the same, so a site's cost depends on how many are
kept, by a table - it need not be linear (a roofline is not). Token counts change every cost, so
all tables have the token option as first axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Choice", "LayerChoices", "Problem", "SiteChoices", "TokenOption"]

Costs = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SiteChoices:
    """Switches of one attention block or MLP.

    Attributes:
        name: the site's name in the Graph.
        utilities: shape (switches,): what keeping each switch is worth; may be negative.
        costs: shape (token options, metrics, switches + 1), int64: cost of keeping n switches,
            non-decreasing in n.
        minimum: fewest switches kept while the layer is on.
    """

    name: str
    utilities: npt.NDArray[np.float64]
    costs: Costs
    minimum: int = 0

    @property
    def switches(self) -> int:
        """Number of switches."""
        return len(self.utilities)


@dataclass(frozen=True, eq=False)
class LayerChoices:
    """One layer: on (with its sites) or off.

    Attributes:
        name: the layer site's name, or a name of its own where the layer cannot be switched.
        utility: what the layer being on is worth besides its sites.
        costs: shape (token options, metrics), int64: cost of being on, sites' costs not included.
        sites: the narrowable sites inside; empty while the layer is off.
        optional: whether the layer may be off.
    """

    name: str
    utility: float
    costs: Costs
    sites: tuple[SiteChoices, ...] = ()
    optional: bool = True


@dataclass(frozen=True, eq=False)
class TokenOption:
    """One way to set all token stages.

    Attributes:
        keep: image tokens kept after each stage, non-increasing.
        utility: what it is worth.
        costs: shape (metrics,), int64: cost of everything outside the layers (vision encoder,
            projector, lm_head, ...) with this option.
    """

    keep: tuple[int, ...]
    utility: float
    costs: Costs


@dataclass(frozen=True, eq=False)
class Problem:
    """Maximise utility with every metric's cost within its limit.

    Attributes:
        metrics: names, for messages.
        limits: shape (metrics,), int64.
        tokens: at least one token option.
        layers: in model order.
    """

    metrics: tuple[str, ...]
    limits: Costs
    tokens: tuple[TokenOption, ...]
    layers: tuple[LayerChoices, ...]

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
        """Utility of a choice, recomputed from the tables."""
        total = self.tokens[choice.token_option].utility
        for layer, on in zip(self.layers, choice.layers_on, strict=True):
            if on:
                total += layer.utility
                total += sum(
                    float(site.utilities[list(choice.kept[site.name])].sum()) for site in layer.sites
                )
        return float(total)

    def is_feasible(self, choice: Choice) -> bool:
        """Whether a choice respects every limit and every minimum, and leaves no fixed layer off."""
        for layer, on in zip(self.layers, choice.layers_on, strict=True):
            if not on and not layer.optional:
                return False
            for site in layer.sites:
                kept = choice.kept[site.name]
                if len(set(kept)) != len(kept) or (on and len(kept) < site.minimum):
                    return False
                if not on and kept:
                    return False
        return bool((self.cost(choice) <= self.limits).all())


@dataclass(frozen=True)
class Choice:
    """An answer to a Problem.

    Attributes:
        token_option: index into ``Problem.tokens``.
        layers_on: one flag per layer.
        kept: site name -> kept switches, ascending; empty for sites of layers that are off.
    """

    token_option: int
    layers_on: tuple[bool, ...]
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @staticmethod
    def everything(problem: Problem, token_option: int = 0) -> Choice:
        """The base model: all switches on."""
        return Choice(
            token_option,
            tuple(True for _ in problem.layers),
            {s.name: tuple(range(s.switches)) for layer in problem.layers for s in layer.sites},
        )


def top(utilities: npt.NDArray[np.float64], count: int) -> tuple[int, ...]:
    """The `count` most useful switches, ascending; ties go to the lower index."""
    order: Sequence[int] = np.argsort(-utilities, kind="stable")[:count].tolist()
    return tuple(sorted(order))
