"""A comparison of controllers: all cells of all seeds, and how it reads as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from planner.ir.errors import InputError
from planner.training.experiments.comparisons import COMPARISONS, Comparison, Variant
from planner.training.experiments.controllers import (
    CONFIG,
    Measuring,
    compared,
    steps_to_stable,
)
from planner.training.experiments.kept_results import Runs
from planner.training.experiments.over_seeds import grouped, means
from planner.training.experiments.plan_pictures import plan_facts, plan_picture
from planner.training.experiments.published_cells import Published, as_published
from planner.training.experiments.results_page import Rows, plot, table

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

    Every seed is a training run with so many test questions. What a page has already is taken from
    there. With `runs.variants` or `runs.budgets` these alone are measured, and shown beside all
    that is known. InputError: as of `wanted_cells`, or the page is broken.
    """
    name, comparison = runs.name, COMPARISONS[runs.name]
    wanted = wanted_cells(runs)
    page = Published.at(runs.page and runs.page / f"{name}.json")
    cells = [(variant, budget) for variant in comparison.variants for budget in comparison.budgets]
    benches = [replace(bench, published=page) for bench in runs.benches(Measuring)]
    others = page.seeds([benches[0].digest(*cell) for cell in cells])
    also = replace(runs, seeds=[seed for seed in others if seed not in runs.seeds])
    benches += [replace(bench, published=page) for bench in also.benches(Measuring)]
    benches.sort(key=lambda bench: bench.seed)
    seeds = [bench.seed for bench in benches]
    told = replace(runs, seeds=seeds).facts | {"title": comparison.title}
    places = [(bench, variant, budget) for bench in benches for variant, budget in cells]
    # What is known is on the page from the beginning: a run that is stopped loses nothing of it.
    known = {place: place[0].known(*place[1:]) for place in places}

    def stands(plans: Mapping[str, Any] | None = page.plans) -> dict[str, Any]:
        rows = [
            {**row, "cell": bench.digest(variant, budget)}
            for (bench, variant, budget), row in known.items()
            if row is not None
        ]
        learning: list[Mapping[str, Any]] = []
        if name == "exp3":
            for bench in benches:
                for variant in comparison.variants:
                    if variant.plans == "controller":
                        learning += _learned(bench, comparison, variant, page)
        found = told | _results(comparison, rows, learning, page)
        return found | ({"plans": plans} if plans else {})

    for bench in benches:
        if bench.seed not in runs.seeds:
            continue
        for variant in comparison.variants:
            missing = [
                budget
                for budget in comparison.budgets
                if (variant, budget) in wanted and known[bench, variant, budget] is None
            ]
            for budget in missing:
                known[bench, variant, budget] = bench.cell(comparison, variant, budget)
            if missing:
                yield stands()
    plans = _plans_decided(benches, comparison, page) if name == "exp2" else None
    yield stands(plans)


def check_comparison(runs: Runs) -> None:
    """Raise InputError where cells are asked for that there are not, or a page would lose some."""
    wanted_cells(runs)
    comparison = COMPARISONS[runs.name]
    path = runs.page and runs.page / f"{runs.name}.json"
    page = Published.at(path)
    (bench,) = replace(runs, seeds=[0]).benches(Measuring)
    mine = {bench.digest(v, budget) for v in comparison.variants for budget in comparison.budgets}
    if lost := page.unknown + sum(cell not in mine for _, cell in page.rows):
        raise InputError(
            f"'{path}' has {lost} cells of other questions, settings or variants, which would be "
            "lost: give another --output"
        )


def comparison_configurations(runs: Runs) -> Iterator[tuple[Path, Sequence[str]]]:
    """By what the controllers of a comparison are trained: configurations and their settings."""
    for variant in COMPARISONS[runs.name].variants:
        yield CONFIG, [*runs.overrides, *variant.settings]


def wanted_cells(runs: Runs) -> set[tuple[Variant, float]]:
    """Cells that are to be measured where they are missing; InputError where there are no such."""
    comparison = COMPARISONS[runs.name]
    variants = {variant.name: variant for variant in comparison.variants}
    for name in runs.variants:
        if name not in variants:
            known = "; ".join(variants)
            raise InputError(f"{runs.name} has no variant '{name:.80}': its variants are {known}")
    for budget in runs.budgets:
        if budget not in comparison.budgets:
            known = ", ".join(f"{each:g}" for each in comparison.budgets)
            raise InputError(f"{runs.name} has no budget {budget:g}: its budgets are {known}")
    return {
        (variants[name], budget)
        for name in runs.variants or variants
        for budget in runs.budgets or comparison.budgets
    }


def _learned(
    bench: Measuring, comparison: Comparison, variant: Variant, page: Published
) -> list[Mapping[str, Any]]:
    """How a variant of a seed has learned, where it was trained, or a page knows."""
    if bench.is_trained(variant):
        curve = bench.curve(comparison, variant)
        steps = steps_to_stable(curve)
        return [{"variant": variant.name, "seed": bench.seed, "steps": steps, "curve": curve}]
    mine = {"variant": variant.name, "seed": bench.seed}
    return [row for row in page.learning if mine.items() <= row.items()]


def _plans_decided(
    benches: Sequence[Measuring], comparison: Comparison, page: Published
) -> Mapping[str, Any] | None:
    """What the controller of the first seed that was trained here decides, or a page's."""
    first = next(v for v in comparison.variants if v.name == comparison.against[0])
    trained = next((bench for bench in benches if bench.is_trained(first)), None)
    known = page.plans
    if trained is None or (known and known["seed"] <= trained.seed):
        return known
    return plan_facts(trained, comparison)


def _results(comparison: Comparison, rows: Rows, learning: Rows, page: Published) -> dict[str, Any]:
    written = [as_published(row, row["cell"]) for row in rows]
    found: list[Mapping[str, Any]] = []
    for name in comparison.against:
        found += compared(rows, name)
    new = {_of(row) for row in found}
    # Of rows whose questions are not known any more.
    there = {(row["variant"], row["budget"]) for row in rows}
    found += [
        row
        for row in page.differences
        if row["against"] in comparison.against
        and _of(row) not in new
        and {(row[name], row["budget"]) for name in ("variant", "against")} <= there
    ]
    names = [variant.name for variant in comparison.variants]
    found.sort(
        key=lambda row: (
            comparison.against.index(row["against"]),
            names.index(row["variant"]),
            comparison.budgets.index(row["budget"]),
        )
    )
    return {
        "rows": [row for row in written if "infeasible" not in row],
        "infeasible": [row for row in written if "infeasible" in row],
        "differences": found,
        **({"learning": list(learning)} if learning else {}),
    }


def _of(difference: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(difference[name] for name in ("variant", "against", "budget"))


def summary(rows: Rows) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every variant at every budget."""
    measures = ("accuracy", "cost_fraction", "utilisation", "violations", "plans")
    summed_up = means(rows, ("variant", "budget"), measures)
    return [
        {"method": entry["variant"], "tokens": "", "runs": len(members), **entry}
        for entry, members in summed_up
    ]


def comparison_markdown(results: Mapping[str, Any]) -> str:
    """The tables, and how they were made."""
    rows = summary(results["rows"])
    seeds = len({row["seed"] for row in results["rows"]})
    families = list(rows[0]["families"]) if rows else []
    # Not all cells were measured with all seeds.
    runs = ["runs"] if len({row["runs"] for row in rows}) > 1 else []
    cells = [
        [
            row["method"],
            f"{100 * row['budget']:g}%",
            f"{row['cost_fraction']:.1%}",
            f"{100 * row['accuracy']:.1f}"
            + f" ± {100 * row['accuracy_spread']:.1f}" * (row["runs"] > 1),
            f"{row['utilisation']:.1%}",
            f"{row['violations']:g}",
            f"{row['plans']:.0f}",
            *(f"{100 * row['families'][family]:.1f}" for family in families),
            *(str(row[name]) for name in runs),
        ]
        for row in rows
    ]
    measures = ("variant", "budget", "FLOPs", "accuracy", "used", "violations", "plans")
    heads = [*measures, *families, *runs]
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
        *_where_it_pays(results["rows"], families),
        *_learning(results.get("learning", ())),
        *(
            f"{r['variant']} at {100 * r['budget']:g}%: {r['infeasible']}."
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
    runs = ["runs"] if len({row["runs"] for row in rows}) > 1 else []
    for against in dict.fromkeys(row["against"] for row in rows):
        cells = [
            [
                row["variant"],
                f"{100 * row['budget']:g}%",
                f"{100 * row['difference']:+.1f}",
                f"{100 * row['standard_error']:.1f}",
                f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
                *(str(row[name]) for name in runs),
            ]
            for row in rows
            if row["against"] == against
        ]
        lines += [
            f"Against *{against}*, in percentage points, by a paired bootstrap over runs and "
            "questions:",
            "",
            *table(["variant", "budget", "points", "standard error", "95 %", *runs], cells),
            "",
        ]
    return lines


def _where_it_pays(rows: Rows, families: Sequence[str]) -> list[str]:
    """By family, what controllers gain over static plans, and of how much that could be gained.

    Over the seeds that both were measured with.
    """
    known = {(row["variant"], row["budget"], row["seed"]): row for row in rows}
    budgets, seeds = (dict.fromkeys(row[name] for row in rows) for name in ("budget", "seed"))
    cells = []
    for controller, static in _BESIDE:
        for budget in budgets:
            both = [
                (known[controller, budget, seed], known[static, budget, seed])
                for seed in seeds
                if {(controller, budget, seed), (static, budget, seed)} <= known.keys()
            ]
            if not both:
                continue
            gain = mean(own["accuracy"] - other["accuracy"] for own, other in both)
            room = mean(1 - other["accuracy"] for _, other in both)
            gains = [mean(o["families"][f] - s["families"][f] for o, s in both) for f in families]
            closed = f"{gain / room:.0%}" if gain > 0 else ""
            points = [f"{100 * each:+.1f}" for each in gains]
            cells.append(
                [controller, static, f"{100 * budget:g}%", f"{100 * gain:+.1f}", closed, *points]
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
        f"## Plans at {100 * facts['budget']:g}%",
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
