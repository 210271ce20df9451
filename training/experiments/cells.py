"""One cell after the other: trained, measured, kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner.ir.errors import PlannerError
from planner.ir.graph import Graph
from planner.models.calibration import calibrate, read_samples
from planner.models.calibration.samples import Question
from planner.models.scheduling import Deciding, Scheduled, load_scheduler
from planner.models.scheduling.scheduled_model import Decide
from planner.planning.catalog import find_model
from planner.planning.request import Request
from planner.planning.switches import with_switches
from planner.planning.utilities import Utilities, save_utilities
from planner.training.config import CONFIGS
from planner.training.data import SceneQuestions
from planner.training.evaluate import TEXT_TOKENS, UnderBudgets, predict
from planner.training.experiments.definitions import Cell
from planner.training.experiments.kept_results import Bench, kept_or_measured
from planner.training.experiments.learning import label_file, losses_of, regret_of
from planner.training.recipes import load_recipe

# Questions on which skipping and masking must give the same answers.
PARITY_QUESTIONS = 24
CALIBRATION_QUESTIONS = 24


@dataclass(frozen=True, eq=False)
class TableBench(Bench):
    """Models of one seed and their measured cells."""

    def measured(self, cell: Cell) -> dict[str, Any]:
        """A cell, from its file or measured now."""
        return self._kept(cell.key, cell, self._measure)

    def learned(self, cell: Cell) -> dict[str, Any]:
        """The regret of a cell's scheduler on validation questions, and its losses in training."""
        return self._kept(f"{cell.method}_learned".replace(" ", "-"), cell, self._learned)

    def _kept(
        self, name: str, cell: Cell, measure: Callable[[Cell], dict[str, Any]]
    ) -> dict[str, Any]:
        identity = {
            "cell": repr(cell),
            "samples": self.samples,
            "overrides": self.changes,
            # Of what is kept: 2 with the scores of all questions.
            "format": 2,
        }
        path = self.work / "cells" / f"seed-{self.seed}" / f"{name}.json"
        return kept_or_measured(path, identity, lambda: measure(cell))

    def _learned(self, cell: Cell) -> dict[str, Any]:
        folder = self._trained(cell)
        known = self.load(str(folder))
        self.say(f"regret of {cell.method}")
        scheduler = load_scheduler(folder, known.graph)
        scheduled = Scheduled(known.model, known.graph, scheduler, mask=True)
        return {
            "method": cell.method,
            "regret": regret_of(scheduled, known.processor, self.seed),
            "losses": losses_of(folder.parent / "run"),
        }

    def _measure(self, cell: Cell) -> dict[str, Any]:
        folder = self._trained(cell) if cell.config else _shipped()
        known = self.load(str(folder))
        model, processor, graph = known.model, known.processor, known.graph
        self.say(f"{cell.method} {cell.tokens} at {cell.budget:g}")
        scheduled, utilities = None, "prior"
        if cell.config:
            scheduler = load_scheduler(folder, graph)
            decide = _rule(cell.rule, self.seed, scheduler.layout.decide)
            scheduled = Scheduled(model, graph, scheduler, mask=True, decide=decide)
        elif cell.rule == "calibrated":
            utilities = str(calibrated(model, processor, graph, self.work))
        request = Request(
            "tiny-llava",
            switches=cell.switches or ("tokens" if cell.tokens else "layers"),
            tokens=cell.tokens or None,
            utilities=utilities,
            text_tokens=TEXT_TOKENS,
        )
        questions = SceneQuestions("test", self.samples, self.seed)
        deciding = Deciding(model, processor, graph, scheduled)
        bench = UnderBudgets(deciding, questions, request)
        measured = bench.measure(cell.budget)
        if scheduled is not None:
            _check_parity(scheduled, bench, cell)
        return {
            "method": cell.method,
            "tokens": cell.tokens,
            "rule": cell.rule,
            **measured,
            "success": 1 - measured["violations"] / measured["samples"],
        }

    def _trained(self, cell: Cell) -> Path:
        """The folder of a trained model; what was trained already is found again."""
        own = (*cell.overrides, *self.overrides)
        before = [f"labels-{cell.labels}"] if cell.labels else []
        told = (o.replace("=", "-") for o in (*cell.overrides, *self.changes))
        label = "_".join([Path(cell.config).stem, *before, *told])

        def train(settings: list[str]) -> None:
            if cell.labels:
                base = self.load(str(_shipped()))
                labels = label_file(base.model, base.processor, base.graph, cell.labels, self.work)
                settings = [*settings, f"labels={labels}"]
            run, parsed = load_recipe(CONFIGS / cell.config, [*settings, *own])
            run(parsed)

        return self.trained(label, label, "scheduler.json", train)


def _shipped() -> Path:
    folder = find_model("tiny-llava").folder
    assert folder is not None
    return folder


def calibrated(model: Any, processor: Any, graph: Graph, work: Path) -> Path:
    """Utilities of a model by leave-one-out on scenes of the training split, measured once."""
    path = work / "calibrated.npz"
    if path.is_file():
        return path
    pictures = work / "calibration"
    pictures.mkdir(parents=True, exist_ok=True)
    questions = []
    for number, scene in enumerate(SceneQuestions("train", CALIBRATION_QUESTIONS)):
        assert scene.image is not None
        scene.image.save(pictures / f"{number}.png")
        questions.append(Question(pictures / f"{number}.png", scene.turns[0].question, None))
    divided = with_switches(graph)
    samples = read_samples(model, processor, questions, len(questions), 0)
    found = calibrate(model, divided, samples, measure="kl", partial=work / "calibrated.partial")
    save_utilities(path, Utilities(path.name, found.sites, found.tokens), divided, "{}")
    return path


def _rule(name: str, seed: int, scheduler: Decide) -> Decide:
    """How switches are chosen from logits and limits."""
    generator = torch.Generator().manual_seed(seed)

    def decide(logits: Tensor, limits: Tensor) -> Tensor:
        if name == "threshold":
            return logits > 0
        if name == "random":
            logits = torch.rand(logits.shape, generator=generator)
        elif name == "depth":
            logits = -torch.arange(logits.shape[1]).float().expand_as(logits)
        return scheduler(logits, limits)

    return decide


def _check_parity(scheduled: Scheduled, bench: UnderBudgets, cell: Cell) -> None:
    """Cells are measured by masks, which many plans in a batch do not slow down.

    Raises PlannerError: skipping answers otherwise.
    """
    if cell.rule == "random":
        return
    few = [bench.samples[i] for i in range(min(PARITY_QUESTIONS, len(bench.samples)))]
    answers = []
    for mask in (True, False):
        model, graph, decide = scheduled.model, scheduled.graph, scheduled.decide
        runs = Scheduled(model, graph, scheduled.scheduler, mask=mask, decide=decide)
        with runs.using(cell.budget, bench.stages):
            answers.append(predict(model, bench.loaded.processor, few, bench.batch_size))
    if answers[0] != answers[1]:
        raise PlannerError(f"{cell.method} at {cell.budget:g}: skipping and masking disagree")
