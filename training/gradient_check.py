"""How good estimators' gradients are, where the exact gradient can be had by enumeration.

    python -m planner.training.gradient_check [--draws N] [--seed N] [--json]

The objective is the mean of f over an estimator's own samples, where f is a linear or a pairwise
function of six switches, or of AdaLLaVA-H's units. Score functions (REINFORCE), which are unbiased,
are there to compare: the gradient of (f - mean f) times the log-probability.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations, permutations

import torch
from torch import Tensor

from planner.training.estimators import Drawn, GumbelSequential, parse
from planner.training.sequential_draws import log_probability
from planner.training.switch_costs import AdditiveCosts


@dataclass(frozen=True, eq=False)
class Case:
    """A function of switches, and who may be on."""

    name: str  # of the case
    logits: Tensor  # shape (switches,)
    costs: Tensor  # shape (switches,), int64
    limit: int  # of the cost
    linear: Tensor  # shape (switches,): what f adds for a gate
    pairs: Tensor  # shape (switches, switches): what f adds for two gates
    # (heads of a layer, heads of a unit) where switches are drawn in units.
    units: tuple[int, int] | None = None

    def f(self, gates: Tensor) -> Tensor:
        """Of gates (batch, switches); shape (batch,)."""
        return gates @ self.linear + ((gates @ self.pairs) * gates).sum(-1)


@dataclass(frozen=True)
class Check:
    """One method's gradient in one case."""

    # As `planner.training.estimators.parse` reads it; "score of ..." for score functions.
    method: str
    case: str  # name of the case
    bias: float  # norm of (mean gradient - exact gradient), relative to the exact gradient
    # Standard error of the mean gradient, in the same unit; a smaller bias is chance.
    bias_error: float
    cosine: float  # between the mean gradient and the exact one
    deviation: float  # root of the summed variances of one draw, in the same unit


def _cases() -> tuple[Case, ...]:
    generator = torch.Generator().manual_seed(7)
    logits, linear = torch.randn(2, 6, generator=generator)
    pairs = torch.randn(6, 6, generator=generator).triu(1)
    equal, unequal = torch.tensor([[1, 1, 1, 1, 1, 1], [3, 1, 2, 5, 2, 4]])
    many, worth = torch.randn(2, 16, generator=generator)
    both = torch.randn(16, 16, generator=generator).triu(1)
    ones = torch.ones(16, dtype=torch.int64)
    return (
        Case("3 of 6, linear", logits, equal, 3, linear, torch.zeros_like(pairs)),
        Case("3 of 6, pairwise", logits, equal, 3, linear, pairs),
        Case("unequal costs, pairwise", logits, unequal, 8, linear, pairs),
        Case("2 of 4 units, pairwise", many, ones, 2, worth, both, units=(4, 2)),
    )


CASES = _cases()
METHODS = (
    "gumbel:temperature=5",
    "gumbel:temperature=1",
    "gumbel:temperature=0.5",
    "gumbel-topk:temperature=1",
    "gumbel-topk:temperature=0.5",
    "simple",
    "score of gumbel",
    "score of simple",
)
_SCORE = "score of "


def methods_of(case: Case) -> tuple[str, ...]:
    """Those of `METHODS` that a case can have: units are drawn by ``gumbel``."""
    return METHODS if case.units is None else METHODS[:3]


def fillings(costs: Sequence[int], limit: int) -> list[tuple[int, ...]]:
    """All subsets that fit a limit and leave no room for another item, by enumeration."""
    items = range(len(costs))
    found = []
    for size in range(len(costs) + 1):
        for subset in combinations(items, size):
            left = limit - sum(costs[i] for i in subset)
            if left >= 0 and all(costs[i] > left for i in items if i not in subset):
                found.append(subset)
    return found


def _mean_of_units(case: Case, heads: int, unit: int, logits: Tensor) -> Tensor:
    """The mean of f over draws of units, by enumeration; differentiable in logits (switches,)."""
    layers = len(logits) // (2 * heads)

    def chance(places: Sequence[int], members: tuple[int, ...]) -> Tensor:
        """Of the best members under Gumbel noise, in whatever order, among places."""
        total = logits.new_zeros(())
        for order in permutations(members):
            left, each = [*places], logits.new_ones(())
            for place in order:
                each = each * logits[left].softmax(0)[left.index(place)]
                left.remove(place)
            total = total + each
        return total

    def mean(taken: frozenset[int], draws: int) -> Tensor:
        if not draws:
            gates = torch.zeros(1, len(logits), dtype=logits.dtype)
            gates[0, list(taken)] = 1
            return case.f(gates)[0]
        left = [place for place in range(len(logits)) if place not in taken]
        shares, total = logits[left].softmax(0), logits.new_zeros(())
        for layer in range(layers):
            first = 2 * heads * layer
            sites = [
                [p for p in left if first + heads * s <= p < first + heads * (s + 1)]
                for s in (0, 1)
            ]
            inside = [number for number, p in enumerate(left) if p in sites[0] + sites[1]]
            for some in combinations(sites[0], unit):
                for others in combinations(sites[1], unit):
                    likely = (
                        shares[inside].sum() * chance(sites[0], some) * chance(sites[1], others)
                    )
                    total = total + likely * mean(taken | {*some, *others}, draws - 1)
        return total

    return mean(frozenset(), case.limit)


def exact_gradient(case: Case, method: str) -> Tensor:
    """Gradient of the mean of f over a method's samples, by enumeration; shape (switches,)."""
    return _enumerated(case, method.removeprefix(_SCORE).startswith("simple"))


@cache
def _enumerated(case: Case, is_simple: bool) -> Tensor:
    logits = case.logits.clone().requires_grad_()
    if case.units:
        (gradient,) = torch.autograd.grad(_mean_of_units(case, *case.units, logits), logits)
        return gradient
    subsets = fillings(case.costs.tolist(), case.limit)
    if is_simple:
        chances = torch.stack([logits[list(subset)].sum() for subset in subsets]).softmax(0)
        members = subsets
    else:
        # In every order, for what is drawn early decides what still fits.
        members = [order for subset in subsets for order in permutations(subset)]
        columns = torch.full((len(members), max(map(len, members))), -1)
        for row, order in zip(columns, members):
            row[: len(order)] = torch.tensor(order, dtype=torch.int64)
        rows = logits.expand(len(members), -1)
        limits = torch.full((len(members),), case.limit)
        chances = log_probability(columns, rows, AdditiveCosts(case.costs[None]), limits).exp()
    gates = torch.zeros(len(members), len(logits))
    for row, subset in zip(gates, members):
        row[list(subset)] = 1
    (gradient,) = torch.autograd.grad(chances @ case.f(gates), logits)
    return gradient


def check(case: Case, method: str, draws: int = 50_000, seed: int = 0) -> Check:
    """Compare the gradients of so many draws by one of `METHODS`, or alike, with the exact one."""
    estimator = parse(method.removeprefix(_SCORE))
    logits = case.logits.repeat(draws, 1).requires_grad_()
    limits = torch.full((draws,), case.limit)
    generator = torch.Generator().manual_seed(seed)
    if case.units:
        assert isinstance(estimator, GumbelSequential)
        drawn = Drawn(estimator.draw_units(logits, limits, *case.units, generator))
    else:
        drawn = estimator.draw(logits, AdditiveCosts(case.costs[None]), limits, generator)
    values = case.f(drawn.gates)
    if method.startswith(_SCORE):
        assert drawn.log_probability is not None
        values = values.detach()
        values = (values - values.mean()) * drawn.log_probability
    # Rows do not see one another, so row r of the gradient is that of draw r.
    (found,) = torch.autograd.grad(values.sum(), logits)
    exact = exact_gradient(case, method)
    scale = exact.norm().item()
    deviation = found.var(0).sum().sqrt().item() / scale
    return Check(
        method,
        case.name,
        bias=(found.mean(0) - exact).norm().item() / scale,
        bias_error=deviation / draws**0.5,
        cosine=torch.cosine_similarity(found.mean(0), exact, 0).item(),
        deviation=deviation,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Estimators' gradients against exact ones.")
    parser.add_argument("--draws", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.draws < 2:
        parser.error("--draws must be at least 2")
    found = [
        check(case, name, options.draws, options.seed)
        for case in CASES
        for name in methods_of(case)
    ]
    if options.json:
        print(json.dumps([asdict(row) for row in found], indent=1))
        return
    print("| case | method | bias | standard error | cosine | deviation of one draw |")
    print("|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row.case} | {row.method} | {row.bias:.3f} | {row.bias_error:.3f} "
            f"| {row.cosine:.3f} | {row.deviation:.2f} |"
        )


if __name__ == "__main__":
    main()
