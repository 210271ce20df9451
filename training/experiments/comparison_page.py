"""A comparison of controllers: all cells of all seeds, and how it reads as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from planner.training.experiments.comparisons import COMPARISONS, Comparison, Variant
from planner.training.experiments.controllers import (
    Measuring,
    compared,
    steps_to_stable,
)
from planner.training.experiments.kept_results import Runs
from planner.training.experiments.over_seeds import grouped, means
from planner.training.experiments.plan_pictures import plan_facts, plan_picture
from planner.training.experiments.results_page import Rows, plot, table

# Of a cell, what is too long for a table: each question's digit, and a static plan's decision.
_OWN = ("right", "plan")
_TUNED = "all, tuned from 900 steps"
# Controllers, and static plans on the same weights or on weights of their own.
_BESIDE = (
    ("all", "static"),
    ("all", "static, tuned"),
    ("all, tuned", "static, tuned"),
    ("all, 900 steps", "static, 900 steps"),
    (_TUNED, "static, tuned from 900 steps"),
    (_TUNED, "static, tuned"),
    (_TUNED, "static, 1050 steps"),
)


def run_comparison(runs: Runs) -> Iterator[dict[str, Any]]:
    """Train and measure what is missing of a comparison; tell how it stands, the last time whole.

    Every seed is a training run with so many test questions.
    """
    name, comparison = runs.name, COMPARISONS[runs.name]
    benches = runs.benches(Measuring)
    told = runs.facts | {"title": comparison.title}
    rows: list[dict[str, Any]] = []
    learning: list[dict[str, Any]] = []
    for bench in benches:
        for variant in comparison.variants:
            known = all(bench.knows(variant, budget) for budget in comparison.budgets)
            rows += [bench.cell(comparison, variant, budget) for budget in comparison.budgets]
            if name == "exp3" and variant.plans == "controller":
                learning.append(_learned(bench, comparison, variant))
            if not known:
                yield told | _results(comparison, rows, learning)
    shown = {"plans": plan_facts(benches[0], comparison)} if name == "exp2" else {}
    yield told | _results(comparison, rows, learning) | shown


def _learned(bench: Measuring, comparison: Comparison, variant: Variant) -> dict[str, Any]:
    curve = bench.curve(comparison, variant)
    steps = steps_to_stable(curve)
    return {"variant": variant.name, "seed": bench.seed, "steps": steps, "curve": curve}


def _results(comparison: Comparison, rows: Rows, learning: Rows) -> dict[str, Any]:
    measured = [row for row in rows if "right" in row]
    return {
        "rows": [{k: v for k, v in row.items() if k not in _OWN} for row in measured],
        "infeasible": [row for row in rows if "right" not in row],
        "differences": [row for name in comparison.against for row in compared(rows, name)],
        **({"learning": list(learning)} if learning else {}),
    }


def summary(rows: Rows) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every variant at every budget."""
    measures = ("accuracy", "cost_fraction", "utilisation", "violations", "plans")
    summed_up = means(rows, ("variant", "budget"), measures)
    return [{"method": entry["variant"], "tokens": "", **entry} for entry, _ in summed_up]


def comparison_markdown(results: Mapping[str, Any]) -> str:
    """The tables, and how they were made."""
    rows = summary(results["rows"])
    seeds = len({row["seed"] for row in results["rows"]})
    families = list(rows[0]["families"])
    cells = [
        [
            row["method"],
            f"{row['budget']:.0%}",
            f"{row['cost_fraction']:.1%}",
            f"{100 * row['accuracy']:.1f}" + f" ± {100 * row['accuracy_spread']:.1f}" * (seeds > 1),
            f"{row['utilisation']:.1%}",
            f"{row['violations']:g}",
            f"{row['plans']:.0f}",
            *(f"{100 * row['families'][family]:.1f}" for family in families),
        ]
        for row in rows
    ]
    heads = ["variant", "budget", "FLOPs", "accuracy", "used", "violations", "plans", *families]
    lines = [
        f"# {results['title']}",
        "",
        (f"{seeds} training runs, " if seeds > 1 else "One training run, ")
        + f"{results['samples']} test questions each; accuracy in percent"
        + ", as mean ± standard deviation over runs" * (seeds > 1)
        + ". FLOPs are of the language model's prefill, the controller's own among them, over the "
        "base model's. What the variants are: [unified](../unified.md#experiments).",
        "",
        *table(heads, cells),
        "",
        *_differences(results["differences"]),
        *_where_it_pays(rows, families),
        *_learning(results.get("learning", ())),
        *(
            f"{r['variant']} at {r['budget']:.0%}: {r['infeasible']}."
            for r in results["infeasible"]
        ),
        "",
        f"![accuracy over FLOPs]({results['experiment']}.svg)",
        "",
        *_plans(results.get("plans")),
        f"    {results['command']}",
    ]
    return "\n".join(lines) + "\n"


def _differences(rows: Rows) -> list[str]:
    lines = []
    for against in dict.fromkeys(row["against"] for row in rows):
        cells = [
            [
                row["variant"],
                f"{row['budget']:.0%}",
                f"{100 * row['difference']:+.1f}",
                f"{100 * row['standard_error']:.1f}",
                f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            ]
            for row in rows
            if row["against"] == against
        ]
        lines += [
            f"Against *{against}*, in percentage points, by a paired bootstrap over runs and "
            "questions:",
            "",
            *table(["variant", "budget", "points", "standard error", "95 %"], cells),
            "",
        ]
    return lines


def _where_it_pays(rows: Rows, families: Sequence[str]) -> list[str]:
    """By family, what controllers gain over static plans, and of how much that could be gained."""
    known = {(row["method"], row["budget"]): row for row in rows}
    cells = []
    for controller, static in _BESIDE:
        for budget in dict.fromkeys(row["budget"] for row in rows):
            own, other = known.get((controller, budget)), known.get((static, budget))
            if own and other:
                gains = [own["families"][f] - other["families"][f] for f in families]
                gain, room = own["accuracy"] - other["accuracy"], 1 - other["accuracy"]
                closed = f"{gain / room:.0%}" if gain > 0 else ""
                points = [f"{100 * each:+.1f}" for each in gains]
                cells.append(
                    [controller, static, f"{budget:.0%}", f"{100 * gain:+.1f}", closed, *points]
                )
    if not cells:
        return []
    heads = ["controller", "over", "budget", "all families", "of the regret, at least", *families]
    return [
        "What controllers gain over one plan for all questions, in percentage points, and by "
        "family. The regret is what an oracle has over that plan; here it is all that the plan "
        "gets wrong, which no oracle's can pass.",
        "",
        *table(heads, cells),
        "",
    ]


def _plans(facts: Mapping[str, Any] | None) -> list[str]:
    if facts is None:
        return []
    cells = [
        [
            row["family"],
            f"{row['image_tokens']:.1f} ± {row['image_tokens_spread']:.1f}",
            *(f"{row[axis]:.1%}" for axis in ("layers", "heads", "mlp")),
            f"{row['within']:.1%}",
            f"{row['between']:.1%}",
        ]
        for row in facts["families"]
    ]
    heads = [
        "family",
        "image tokens",
        "layers on",
        "heads on",
        "MLP groups on",
        "within",
        "between",
    ]
    return [
        f"## Plans at {facts['budget']:.0%}",
        "",
        f"Of *all*, seed {facts['seed']}: image tokens kept, and of what may be switched what is "
        "on. *within* and *between*: the share of switches in which the plans of two questions "
        "differ, of one family and of two.",
        "",
        *table(heads, cells),
        "",
        "![plans of a question of each family](exp2-plans.svg)",
        "",
        "A question of each family: the picture, with the tokens that were dropped faded; what the "
        "latency token attends to in the image, in the last layer that always runs, mean over "
        "heads; and the layers that may be switched, heads left and MLP groups right, dark where "
        "they run.",
        "",
    ]


def _learning(rows: Rows) -> list[str]:
    if not rows:
        return []
    cells = [
        [name, ", ".join("never" if r["steps"] is None else str(r["steps"]) for r in members)]
        for (name,), members in grouped(rows, "variant").items()
    ]
    return [
        "Steps after which the loss of the plans drawn stays within a tenth of its fall, by run:",
        "",
        *table(["variant", "steps"], cells),
        "",
    ]


def comparison_pictures(results: Mapping[str, Any]) -> dict[str, bytes]:
    """The plot, and where it is known what was decided, that."""
    pictures = {"": plot(summary(results["rows"]))}
    return pictures | ({"-plans": plan_picture(results["plans"])} if "plans" in results else {})
