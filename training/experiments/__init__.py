"""Tables of the AdaLLaVA paper on a small model: what is trained, what is measured, on what.

    planner experiment table1 [--seeds 0,1,2] [--samples 2000]

Every cell is measured once and kept in the working folder, so a run that was stopped goes on. A
seed stands for the training run and for the test questions, so the base model has a spread too.

    definitions   which cells make which table
    cells         training and measuring them
    kept_results  what benches of experiments share: results kept in files, training runs
    learning      labels to start from, the regret of plans, the losses of training
    paired_bootstrap
                  differences between methods, with intervals
    results_page  tables as text and pictures
    comparisons   which controllers are compared
    controllers   training and measuring them
    forced_plans  plans that take a controller's place on its weights
    plan_pictures
                  what a controller decides, by family and in pictures
    comparison_page
                  a comparison of controllers as text and pictures
    smollm2       utilities, recovery and healing on a real language model
    packaged      weights and texts that packages bring along
    sparse_answers
                  Dynamic-LLaVA's predictors against rules, by perplexity
    layer_regret  how well utilities tell which layers may go
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from planner.progress import Say
from planner.training.experiments.cells import TableBench
from planner.training.experiments.definitions import EXPERIMENTS
from planner.training.experiments.learning import learned
from planner.training.experiments.paired_bootstrap import paired_bootstrap

__all__ = ["EXPERIMENTS", "run_experiment", "summarise"]


def run_experiment(
    name: str,
    work: Path,
    seeds: Sequence[int] = (0, 1, 2),
    samples: int = 2000,
    overrides: Sequence[str] = (),
    progress: Say = lambda text: None,
) -> dict[str, Any]:
    """Train and measure what is missing of a table of `EXPERIMENTS`, and give it back whole.

    Every seed is a training run with so many test questions; the other arguments are `Bench`'s.
    Raises PlannerError: skipping and masking disagree; nothing is reported then.
    """
    experiment = EXPERIMENTS[name]
    rows, learning = [], []
    methods = {cell.method: cell for cell in experiment.cells if experiment.learning}
    for seed in seeds:
        bench = TableBench(work, seed, samples, tuple(overrides), progress)
        for cell in experiment.cells:
            rows.append({"seed": seed, **bench.measured(cell)})
        for cell in methods.values():
            learning.append({"seed": seed, **bench.learned(cell)})
    results = {
        "experiment": name,
        "title": experiment.title,
        "seeds": list(seeds),
        "samples": samples,
        "overrides": list(overrides),
        "cells": [{k: v for k, v in row.items() if k != "scores"} for row in rows],
        "summary": summarise(rows),
    }
    if learning:
        results |= {"learning": learning, "learned": learned(learning)}
    return results


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every row, in the order of the first seed.

    `against_base`, in rows beside the base model's, is the difference of accuracies by a paired
    bootstrap over seeds and questions; the base model is the row whose rule is ``base``, all tokens
    kept.
    """
    base = {r["seed"]: r["scores"] for r in rows if r["rule"] == "base" and not r["tokens"]}
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["tokens"], row["budget"]), []).append(row)
    summary = []
    for (method, tokens, budget), members in groups.items():
        entry: dict[str, Any] = {"method": method, "tokens": tokens, "budget": budget}
        for measure in ("accuracy", "cost_fraction", "utilisation", "success"):
            values = [float(member[measure]) for member in members]
            entry[measure] = mean(values)
            entry[f"{measure}_spread"] = stdev(values) if len(values) > 1 else 0.0
        if base and (members[0]["rule"] != "base" or tokens):
            pairs = [np.subtract(m["scores"], base[m["seed"]]) for m in members]
            entry["against_base"] = paired_bootstrap(pairs)
        families = members[0]["families"]
        entry["families"] = {f: mean(m["families"][f] for m in members) for f in families}
        summary.append(entry)
    return summary
