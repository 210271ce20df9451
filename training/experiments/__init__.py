"""Tables and comparisons on small models, and on one that is not so small, by one command each.

    planner experiment table1 [--seeds 0,1,2] [--samples 2000]

Every cell is measured once and kept in the working folder, so a run that was stopped goes on. A
seed stands for the training run and for the test questions, so the base model has a spread too.

    kept_results  what benches of experiments share: results kept in files, training runs
    over_seeds    results of several seeds summed up, and differences with intervals
    results_page  what pages are made of
    definitions   which cells make which table of the AdaLLaVA paper
    cells         training and measuring them
    learning      labels to start from, the regret of plans, the losses of training
    table_page    a table as text and pictures
    comparisons   which controllers are compared
    controllers   training and measuring them
    forced_plans  plans that take a controller's place on its weights
    plan_pictures
                  what a controller decides, by family and in pictures
    published_cells
                  what a page has, so that it is gone on from
    comparison_page
                  a comparison of controllers as text and pictures
    sparse_answers
                  Dynamic-LLaVA's predictors against rules, by perplexity
    smollm2       utilities, recovery and healing on a real language model
    layer_regret  how well utilities tell which layers may go
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.files import write_bytes, write_text
from planner.ir.errors import InputError
from planner.training.experiments.comparison_page import (
    check_comparison,
    comparison_configurations,
    comparison_markdown,
    comparison_pictures,
    run_comparison,
)
from planner.training.experiments.comparisons import COMPARISONS
from planner.training.experiments.definitions import TABLES
from planner.training.experiments.kept_results import Runs
from planner.training.experiments.smollm2 import run_smollm2, smollm2_page
from planner.training.experiments.sparse_answers import (
    dynamic_configurations,
    dynamic_page,
    run_dynamic,
)
from planner.training.experiments.table_page import (
    run_table,
    table_configurations,
    table_markdown,
    table_pictures,
)
from planner.training.recipes import load_recipe

__all__ = ["EXPERIMENTS", "Experiment", "Runs", "write_results"]


@dataclass(frozen=True)
class Experiment:
    """How something is measured and shown."""

    # Trains and measures what is missing; gives back how it stands, the last time whole.
    run: Callable[[Runs], Iterator[dict[str, Any]]]
    markdown: Callable[[Mapping[str, Any]], str]  # results as a page
    # Results as pictures in SVG, by what follows the experiment's name in theirs.
    pictures: Callable[[Mapping[str, Any]], Mapping[str, bytes]] = lambda results: {}
    # By what its models are trained: configurations, and settings with the user's among them.
    trained_by: Callable[[Runs], Iterable[tuple[Path, Sequence[str]]]] = lambda runs: ()
    # Raises InputError where cells are asked for that are none of its own, or some would be lost.
    check_cells: Callable[[Runs], object] = lambda runs: _whole(runs)

    def check(self, runs: Runs) -> None:
        """Raise InputError where cells or settings do not fit, before anything is measured."""
        self.check_cells(runs)
        configurations = list(self.trained_by(runs))
        if runs.overrides and not configurations:
            raise InputError(f"{runs.name} trains by no configuration: it takes no --set")
        for path, settings in configurations:
            for seed in runs.seeds:
                load_recipe(path, [f"seed={seed}", *settings])


def _whole(runs: Runs) -> None:
    if runs.variants or runs.budgets:
        known = ", ".join(COMPARISONS)
        raise InputError(
            f"--variants and --budgets choose cells of {known}: {runs.name} is measured whole"
        )


EXPERIMENTS: Mapping[str, Experiment] = {
    **dict.fromkeys(
        TABLES, Experiment(run_table, table_markdown, table_pictures, table_configurations)
    ),
    **dict.fromkeys(
        COMPARISONS,
        Experiment(
            run_comparison,
            comparison_markdown,
            comparison_pictures,
            comparison_configurations,
            check_comparison,
        ),
    ),
    "dynamic": Experiment(run_dynamic, dynamic_page, trained_by=dynamic_configurations),
    "smollm2": Experiment(lambda runs: run_smollm2(runs.work, runs.progress), smollm2_page),
}


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write NAME.json, NAME.md and pictures."""
    name = results["experiment"]
    experiment = EXPERIMENTS[name]
    write_text(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / f"{name}.md", experiment.markdown(results))
    for end, picture in experiment.pictures(results).items():
        write_bytes(folder / f"{name}{end}.svg", picture)
