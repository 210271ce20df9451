"""A table of the AdaLLaVA paper: all cells of all seeds, and how it reads as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planner.training.config import CONFIGS
from planner.training.experiments.cells import TableBench
from planner.training.experiments.definitions import TABLES
from planner.training.experiments.kept_results import Runs
from planner.training.experiments.learning import WINDOW, learned
from planner.training.experiments.over_seeds import means, paired_bootstrap
from planner.training.experiments.results_page import Rows, plot, table

_HOW_COMPARED = (
    " Differences from the base model, in percentage points, are by a paired bootstrap over runs "
    "and questions."
)


def run_table(runs: Runs) -> Iterator[dict[str, Any]]:
    """Train and measure what is missing of a table, and give it back whole.

    Raises PlannerError: skipping and masking disagree; nothing is reported then.
    """
    experiment = TABLES[runs.name]
    rows, learning = [], []
    methods = {cell.method: cell for cell in experiment.cells if experiment.learning}
    for bench in runs.benches(TableBench):
        rows += [{"seed": bench.seed, **bench.measured(cell)} for cell in experiment.cells]
        learning += [{"seed": bench.seed, **bench.learned(cell)} for cell in methods.values()]
    yield runs.facts | {
        "title": experiment.title,
        "cells": [{k: v for k, v in row.items() if k != "scores"} for row in rows],
        "summary": summarise(rows),
        **({"learning": learning, "learned": learned(learning)} if learning else {}),
    }


def table_configurations(runs: Runs) -> Iterator[tuple[Path, Sequence[str]]]:
    """By what a table's schedulers are trained: configurations and their settings."""
    for cell in TABLES[runs.name].cells:
        if cell.config:
            yield CONFIGS / cell.config, [*cell.overrides, *runs.overrides]


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every row, in the order of the first seed.

    `against_base`, in rows beside the base model's, is the difference of accuracies by a paired
    bootstrap over seeds and questions; the base model is the row whose rule is ``base``, all tokens
    kept.
    """
    base = {r["seed"]: r["scores"] for r in rows if r["rule"] == "base" and not r["tokens"]}
    summary = []
    measures = ("accuracy", "cost_fraction", "utilisation", "success")
    for entry, members in means(rows, ("method", "tokens", "budget"), measures):
        if base and (members[0]["rule"] != "base" or entry["tokens"]):
            pairs = [np.subtract(m["scores"], base[m["seed"]]) for m in members]
            entry["against_base"] = paired_bootstrap(pairs)
        summary.append(entry)
    return summary


def table_markdown(results: Mapping[str, Any]) -> str:
    """The tables, and how they were made."""
    known: Rows = results.get("learned", ())
    lines = [
        f"# {results['title']}",
        "",
        f"{len(results['seeds'])} training runs, {results['samples']} test questions each; "
        "accuracy as mean ± standard deviation over runs, families as means, in percent. FLOPs are "
        "of the language model's prefill, over the base model's."
        + _HOW_COMPARED
        * any("against_base" in row for row in results["summary"]),
        "",
        *_accuracies(results["summary"], adherence=results["experiment"] == "table3"),
        "",
        *([*_losses(known), "", *_regrets(known), ""] if known else []),
        f"![accuracy over FLOPs]({results['experiment']}.svg)",
        "",
        f"    {results['command']}",
    ]
    return "\n".join(lines) + "\n"


def _accuracies(rows: Rows, adherence: bool) -> list[str]:
    families = list(rows[0]["families"])
    extra = ["success", "utilisation"] if adherence else []
    intervals = any("against_base" in row for row in rows)
    cells = [
        [
            row["method"],
            f"`{row['tokens']}`" if row["tokens"] else "all",
            f"{row['budget']:.0%}",
            f"{row['cost_fraction']:.1%}",
            f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_spread']:.1f}",
            *([_interval(row.get("against_base"))] if intervals else []),
            *(f"{row[measure]:.1%}" for measure in extra),
            *(f"{100 * row['families'][family]:.1f}" for family in families),
        ]
        for row in rows
    ]
    shown = ["accuracy", "- base, 95 %"] if intervals else ["accuracy"]
    return table(["method", "tokens", "budget", "FLOPs", *shown, *extra, *families], cells)


def _interval(found: Mapping[str, float] | None) -> str:
    """A difference in percentage points, and the interval that it is in."""
    if found is None:
        return ""
    low, high = (f"{100 * found[end]:+.1f}" for end in ("low", "high"))
    return f"{100 * found['difference']:+.1f} ({low} to {high})"


def _losses(rows: Rows) -> list[str]:
    steps = sorted({last for row in rows for last, _ in row["loss"]})
    cells = [
        [row["method"], *(f"{dict(row['loss'])[s]:.4f}" for s in steps)]
        for row in rows
        if len(row["loss"]) == len(steps)
    ]
    return [
        "Loss of the joint training in nats per answer token, by steps, means over runs:",
        "",
        *table(["method", *(f"{last - WINDOW + 1}-{last}" for last in steps)], cells),
    ]


def _regrets(rows: Rows) -> list[str]:
    who = ("label", "solver", "static", "random")
    cells = [
        [row["method"], f"{entry['budget']:.0%}", *(f"{entry[name]:.4f}" for name in who)]
        for row in rows
        for entry in row["regret"]
    ]
    return [
        "Regret in nats per answer token on validation questions, means over runs: the loss under "
        "a plan less that under the best plan within the budget, on the same trained model. "
        "*label* is the scheduler's plan, *solver* the best by measured utilities, *static* the "
        "one that is best for all questions together, *random* the mean over plans that use the "
        "budget.",
        "",
        *table(["method", "budget", *who], cells),
    ]


def table_pictures(results: Mapping[str, Any]) -> dict[str, bytes]:
    """The one plot."""
    return {"": plot(results["summary"], results.get("learned", ()), WINDOW)}
