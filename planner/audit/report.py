"""An audit summed up: one document of numbers, for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.audit.crosscheck import UNIT
from planner.audit.label_file import Labels
from planner.audit.surrogate import Surrogate, measure_surrogate
from planner.audit.verdicts import Verdict, judge
from planner.ir.graph import Graph
from planner.progress import Progress
from planner.solver import TOLERANCE
from planner.solver.problem import Flags
from planner.spread import Spread

#: Labels that are shown with the plan that dominates them.
EXAMPLES = 10
#: Tables of a summary: column -> how a row of ``budgets`` fills it.
BUDGET_COLUMNS = {
    "budget": "{budget}",
    "labels": "{labels}",
    "infeasible": "{infeasible}",
    "used": "{utilisation[mean]:.2%}",
    "gap": "{gap[mean]:.4%}",
    "95 %": "{gap[p95]:.4%}",
    "largest": "{gap[max]:.4%}",
    "optimal": "{optimal:.2%}",
    "proven": "{proven:.2%}",
}


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit found."""

    labels: Labels
    verdicts: Sequence[Verdict]  # one per label
    surrogates: Sequence[Surrogate]  # one per label whose plans were all tried
    summary: dict[str, Any]  # the numbers; see docs/audit.md

    @property
    def budget_rows(self) -> list[dict[str, Any]]:
        """Figures of all labels, and by budget, for a table of `BUDGET_COLUMNS`."""
        each = [{**row, "budget": f"{row['budget']:g}"} for row in self.summary["budgets"]]
        return [{**self.summary, "budget": "all"}, *each]

    @property
    def surrogate_columns(self) -> dict[str, str]:
        """Of a table of ``surrogate``: column -> how a row of its ``budgets`` fills it."""
        deciders = self.summary["surrogate"]["budgets"][0]["regret"]
        return {
            "budget": "{budget:g}",
            "plans": "{plans}",
            "rank, additive": "{rank_additive:.3f}",
            "rank, pairwise": "{rank_pairwise:.3f}",
            "error, additive": "{error_additive:.4f}",
            "error, pairwise": "{error_pairwise:.4f}",
            **{who: f"{{regret[{who}]:.4f}}" for who in deciders},
        }


def audit(
    labels: Labels,
    graph: Graph,
    *,
    exact: bool = False,
    spread: Spread[None] | None = None,
    progress: Progress = lambda done, total: None,
) -> Audit:
    """Judge every label; arguments and errors are those of `planner.audit.judge`."""
    verdicts = judge(labels, graph, exact=exact, spread=spread, progress=progress)
    surrogates = measure_surrogate(labels, labels.problems(graph), verdicts)
    terms = labels.terms
    summary: dict[str, Any] = {
        "labels": len(labels),
        "samples": len(set(labels.samples)),
        "model": terms.model,
        "switches": terms.switches,
        "source": terms.source,
        **_figures(verdicts),
        "dominated": _dominated(labels, verdicts),
        "seconds": sum(v.seconds for v in verdicts),
        "seconds_per_label": float(np.mean([v.seconds for v in verdicts])),
        "budgets": [
            {
                "budget": budget,
                "labels": int((labels.budgets == budget).sum()),
                **_figures([v for v, b in zip(verdicts, labels.budgets.tolist()) if b == budget]),
            }
            for budget in sorted(set(labels.budgets.tolist()))
        ],
    }
    if exact:
        summary["exact"] = _exact(labels, verdicts)
    if surrogates:
        summary["surrogate"] = _surrogate(labels, surrogates)
    return Audit(labels, verdicts, surrogates, summary)


def _figures(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    used = np.array([v.utilisation for v in verdicts])
    return {
        "infeasible": sum(not v.feasible for v in verdicts),
        "priced_wrong": sum(not v.priced_right for v in verdicts),
        "utilisation": {
            "mean": float(used.mean()),
            "min": float(used.min()),
            "optimum": float(np.mean([v.best_utilisation for v in verdicts])),
        },
        "gap": _spread([v.gap for v in verdicts]),
        "lost": _spread([v.lost for v in verdicts]),
        "optimal": float(np.mean([v.feasible and v.gap <= TOLERANCE for v in verdicts])),
        "proven": float(np.mean([v.proven for v in verdicts])),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    mean, p95 = float(np.mean(values)), float(np.quantile(values, 0.95))
    return {"mean": mean, "p95": p95, "max": max(values)}


def _dominated(labels: Labels, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    found = [index for index, v in enumerate(verdicts) if v.dominating is not None]
    worst = sorted(found, key=lambda i: verdicts[i].utility - verdicts[i].dominating_utility)
    examples = []
    for index in worst[:EXAMPLES]:
        verdict = verdicts[index]
        assert verdict.dominating is not None
        examples.append(
            {
                "sample": labels.samples[index],
                "budget": float(labels.budgets[index]),
                "without": _names(labels, labels.plans[index] & ~verdict.dominating),
                "with": _names(labels, verdict.dominating & ~labels.plans[index]),
                "utility": [verdict.utility, verdict.dominating_utility],
                "cost": [verdict.cost, verdict.dominating_cost],
            }
        )
    return {"count": len(found), "share": len(found) / len(verdicts), "examples": examples}


def _names(labels: Labels, flags: Flags) -> list[str]:
    return [name for name, flag in zip(labels.switches, flags) if flag]


def _exact(labels: Labels, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How the second solver's optima compare, rounding of its utilities allowed for."""
    rounding = np.abs(labels.utilities).max(axis=1) * UNIT * len(labels.switches)
    apart = np.array([abs((v.exact or 0.0) - v.optimum) for v in verdicts])
    allowed = rounding + np.array([TOLERANCE * abs(v.optimum) for v in verdicts])
    return {"checked": len(verdicts), "different": int((apart > allowed).sum())}


def _surrogate(labels: Labels, surrogates: Sequence[Surrogate]) -> dict[str, Any]:
    """Means over samples, by budget; budgets that leave one plan say nothing and are left out."""
    rows = []
    for budget in sorted(set(labels.budgets.tolist())):
        here = [s for s in surrogates if labels.budgets[s.label] == budget and len(s.losses) > 1]
        if not here:
            continue
        rows.append(
            {
                "budget": budget,
                "samples": len(here),
                "plans": len(here[0].losses),
                "rank_additive": _mean([s.rank_additive for s in here]),
                "rank_pairwise": _mean([s.rank_pairwise for s in here]),
                "error_additive": _mean([np.abs(s.additive - s.losses).mean() for s in here]),
                "error_pairwise": _mean([np.abs(s.pairwise - s.losses).mean() for s in here]),
                "regret": {who: _mean([s.regret[who] for s in here]) for who in here[0].regret},
            }
        )
    return {"samples": len({labels.samples[s.label] for s in surrogates}), "budgets": rows}


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
