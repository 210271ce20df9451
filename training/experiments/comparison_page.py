"""A comparison of controllers: all cells of all seeds, and how it reads as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from planner.files import write_bytes, write_text
from planner.progress import Say
from planner.training.experiments.controllers import (
    COMPARISONS,
    Measuring,
    compared,
    steps_to_stable,
)
from planner.training.experiments.results_page import plot, table

Rows = Sequence[Mapping[str, Any]]
# Of a cell, what is too long for a table: each question's digit, and a static plan's decision.
_OWN = ("right", "plan")


def run_comparison(
    name: str,
    work: Path,
    seeds: Sequence[int],
    samples: int,
    overrides: Sequence[str],
    progress: Say,
) -> dict[str, Any]:
    """Train and measure what is missing of a comparison, and give it back whole.

    Every seed is a training run with so many test questions.
    """
    comparison = COMPARISONS[name]
    rows, learning = [], []
    for seed in seeds:
        bench = Measuring(work, seed, samples, tuple(overrides), progress)
        for variant in comparison.variants:
            rows += [bench.cell(comparison, variant, budget) for budget in comparison.budgets]
        if name == "exp3":
            for variant in (v for v in comparison.variants if v.plans == "controller"):
                curve = bench.curve(comparison, variant)
                stable = steps_to_stable(curve)
                learning.append(
                    {"variant": variant.name, "seed": seed, "steps": stable, "curve": curve}
                )
    flags = "".join(f" --set {override}" for override in overrides)
    listed = ",".join(map(str, seeds))
    measured = [row for row in rows if "right" in row]
    return {
        "experiment": name,
        "title": comparison.title,
        "command": f"planner experiment {name} --seeds {listed} --samples {samples}{flags}",
        "samples": samples,
        "rows": [{k: v for k, v in row.items() if k not in _OWN} for row in measured],
        "infeasible": [row for row in rows if "right" not in row],
        "differences": list(compared(rows, comparison.against)),
        **({"learning": learning} if learning else {}),
    }


def summary(rows: Rows) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every variant at every budget."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["budget"]), []).append(row)
    found = []
    for (variant, budget), members in groups.items():
        entry: dict[str, Any] = {"method": variant, "tokens": "", "budget": budget}
        for measure in ("accuracy", "cost_fraction", "utilisation", "violations", "plans"):
            values = [float(member[measure]) for member in members]
            entry[measure] = mean(values)
            entry[f"{measure}_spread"] = stdev(values) if len(values) > 1 else 0.0
        families = members[0]["families"]
        entry["families"] = {f: mean(m["families"][f] for m in members) for f in families}
        found.append(entry)
    return found


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
            f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_spread']:.1f}",
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
        f"{seeds} training runs, {results['samples']} test questions each; accuracy as mean ± "
        "standard deviation over runs, in percent. FLOPs are of the language model's prefill, the "
        "controller's own among them, over the base model's.",
        "",
        *table(heads, cells),
        "",
        *_differences(results["differences"]),
        *_learning(results.get("learning", ())),
        *(
            f"{r['variant']} at {r['budget']:.0%}: {r['infeasible']}."
            for r in results["infeasible"]
        ),
        "",
        f"![accuracy over FLOPs]({results['experiment']}.svg)",
        "",
        f"    {results['command']}",
    ]
    return "\n".join(lines) + "\n"


def _differences(rows: Rows) -> list[str]:
    if not rows:
        return []
    cells = [
        [
            row["variant"],
            f"{row['budget']:.0%}",
            f"{100 * row['difference']:+.1f}",
            f"{100 * row['standard_error']:.1f}",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
        ]
        for row in rows
    ]
    heads = ["variant", "budget", "points", "standard error", "95 %"]
    return [
        f"Against *{rows[0]['against']}*, in percentage points, by a paired bootstrap over runs "
        "and questions:",
        "",
        *table(heads, cells),
        "",
    ]


def _learning(rows: Rows) -> list[str]:
    if not rows:
        return []
    methods: dict[str, list[Any]] = {}
    for row in rows:
        methods.setdefault(row["variant"], []).append(row["steps"])
    cells = [
        [name, ", ".join("never" if s is None else str(s) for s in steps)]
        for name, steps in methods.items()
    ]
    return [
        "Steps after which the loss of the plans drawn stays within a tenth of its fall, by run:",
        "",
        *table(["variant", "steps"], cells),
        "",
    ]


def write_comparison(results: Mapping[str, Any], folder: Path) -> None:
    """Write NAME.json, NAME.md and NAME.svg."""
    name = results["experiment"]
    write_text(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / f"{name}.md", comparison_markdown(results))
    write_bytes(folder / f"{name}.svg", plot(summary(results["rows"])))
