"""How far utilities are from the truth: the loss of every plan there is, against what they predict.

The additive surrogate says that what two switches are worth off together is the sum of what each is
worth; the pairwise one adds, for every pair, what was measured beyond that. Both predict the change
of the loss, and a decision is judged by its regret: its true loss less that of the best plan within
the limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from planner.audit.heuristic import decide, worth
from planner.audit.label_file import Labels
from planner.audit.verdicts import Verdict
from planner.solver.problem import Flags, Floats, Problem


@dataclass(frozen=True, eq=False)
class Surrogate:
    """One label's problem, every plan of which was tried."""

    label: int  # its number in the file
    losses: Floats  # (plans,): change of the loss under the plans that fill the limit
    additive: Floats  # (plans,): as predicted
    pairwise: Floats  # (plans,): as predicted
    rank_additive: float  # Spearman's correlation with the losses; NaN where all are alike
    rank_pairwise: float
    regret: dict[str, float]  # who decided -> nats per answer token


def all_plans(switches: int) -> Flags:
    """Every plan of so many switches, shape (2 ^ switches, switches), in the order of `losses`."""
    numbers = np.arange(1 << switches)[:, None]
    plans: Flags = (numbers >> np.arange(switches)[None, :]) % 2 == 1
    return plans


def predictions(losses: Floats, plans: Flags) -> tuple[Floats, Floats]:
    """(additive, pairwise) predictions for plans, from the losses without one and two switches.

    `losses`: of all plans, shape (2 ^ switches,). `plans`: shape (plans, switches).
    """
    switches = plans.shape[1]
    full = (1 << switches) - 1
    bits = 1 << np.arange(switches)
    single = losses[full - bits]
    both = losses[full - (bits[:, None] | bits[None, :])]
    beyond = np.triu(both - single[:, None] - single[None, :], 1)
    off = (~plans).astype(np.float64)
    additive = off @ single
    return additive, additive + ((off @ beyond) * off).sum(-1)


def measure_surrogate(
    labels: Labels, problems: Mapping[float, Problem], verdicts: Sequence[Verdict]
) -> list[Surrogate]:
    """Every label whose losses were measured; its problem has switches of layers alone."""
    if not labels.losses:
        return []
    static = _static(labels, problems)
    return [_measure(labels, index, problems, verdicts[index], static) for index in labels.losses]


def _fits(problem: Problem, plans: Flags) -> tuple[Flags, Flags]:
    """Which plans of a problem of layers fit, and which of them leave no room for a further layer;
    shape (plans,) each."""
    each = np.array([layer.costs[0, 0] for layer in problem.layers if layer.optional])
    left = problem.limits[0] - problem.smallest_costs()[0, 0] - plans @ each
    cheapest = np.where(plans, np.iinfo(np.int64).max, each).min(axis=1, initial=1 << 62)
    return left >= 0, (left >= 0) & (left < cheapest)


def _static(labels: Labels, problems: Mapping[float, Problem]) -> dict[float, int]:
    """Budget -> the plan that is best for all samples together."""
    totals: dict[float, Floats] = {}
    for index, losses in labels.losses.items():
        budget = float(labels.budgets[index])
        totals[budget] = totals.get(budget, 0.0) + losses
    plans = all_plans(len(labels.switches))
    found = {}
    for budget, total in totals.items():
        fits, _ = _fits(problems[budget], plans)
        found[budget] = int(np.where(fits, total, np.inf).argmin())
    return found


def _measure(
    labels: Labels,
    index: int,
    problems: Mapping[float, Problem],
    verdict: Verdict,
    static: Mapping[float, int],
) -> Surrogate:
    losses, budget = labels.losses[index], float(labels.budgets[index])
    problem = problems[budget].with_utilities(worth(labels.utilities[index]))
    plans = all_plans(len(labels.switches))
    fits, fills = _fits(problem, plans)
    additive, pairwise = predictions(losses, plans)
    best = losses[fits].min()

    def regret(flags: Flags) -> float:
        return float(losses[(flags << np.arange(len(flags))).sum()] - best)

    return Surrogate(
        label=index,
        losses=losses[fills],
        additive=additive[fills],
        pairwise=pairwise[fills],
        rank_additive=_rank(additive[fills], losses[fills]),
        rank_pairwise=_rank(pairwise[fills], losses[fills]),
        regret={
            "label": regret(labels.plans[index]),
            "heuristic": regret(decide(problem)),
            "solver": regret(verdict.best),
            "signed": float(losses[np.where(fits, additive, np.inf).argmin()] - best),
            "pairwise": float(losses[np.where(fits, pairwise, np.inf).argmin()] - best),
            "static": float(losses[static[budget]] - best),
            "random": float(losses[fills].mean() - best),
        },
    )


def _rank(predicted: Floats, true: Floats) -> float:
    if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return float("nan")
    return float(spearmanr(predicted, true).statistic)
