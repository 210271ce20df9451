"""What a scheduler learned: labels to start from, the regret of its plans, losses on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from planner.audit import Labels, Terms, audit, write_labels
from planner.ir.graph import Graph
from planner.models.scheduling import Scheduled
from planner.training.evaluate import TEXT_TOKENS
from planner.training.experiments.kept_results import losses_logged
from planner.training.experiments.over_seeds import grouped
from planner.training.labelling import label_samples
from planner.training.question_samples import scene_samples

# One, two and three of tiny-llava's four switches.
BUDGETS = (0.65, 0.75, 0.9)
# Validation questions on which every plan is tried.
REGRET_QUESTIONS = 48
# Steps over which losses are averaged.
WINDOW = 50


def label_file(model: Any, processor: Any, graph: Graph, count: int, work: Path) -> Path:
    """Labels of a model on questions of the training split, made once."""
    path = work / f"labels-{count}.parquet"
    if not path.is_file():
        partial = path.with_name(path.name + ".partial")
        samples = scene_samples(model, processor, "train", count, 0)
        write_labels(path, _labels(model, graph, samples, partial=partial))
    return path


def regret_of(scheduled: Scheduled, processor: Any, seed: int) -> list[dict[str, Any]]:
    """By budget: the mean regret of the scheduler's plans, and of others', see `planner.audit`.

    The scheduler masks, and the seed is that of questions of the validation split.
    """
    model, graph = scheduled.model, scheduled.graph
    samples = scene_samples(model, processor, "val", REGRET_QUESTIONS, seed)
    labels = _labels(model, graph, samples, tried=len(samples), scheduled=scheduled)
    found: list[dict[str, Any]] = audit(labels, graph).summary["surrogate"]["budgets"]
    return [{"budget": row["budget"], **row["regret"]} for row in found]


def _labels(model: Any, graph: Graph, samples: Sequence[Any], **options: Any) -> Labels:
    terms = Terms(
        model="tiny-llava",
        fingerprint=str(graph.properties["fingerprint"]),
        switches="adallava-l",
        source="scheduler" if options.get("scheduled") else "heuristic",
        image_tokens=int(graph.properties["image_tokens"]),
        text_tokens=TEXT_TOKENS,
    )
    return label_samples(model, graph, samples, terms, BUDGETS, **options)


def losses_of(run: Path) -> list[tuple[int, float]]:
    """(step, mean loss since the step before) of a training run, from its last checkpoint."""
    return [(entry["step"], entry["loss"]) for entry in losses_logged(run)]


def learned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By method, means over seeds: of the regret by budget, and of losses by window of steps.

    `loss` is a list of (last step of the window, mean).
    """
    found = []
    for (method,), members in grouped(rows, "method").items():
        regrets = zip(*(member["regret"] for member in members), strict=True)
        windows: dict[int, list[float]] = {}
        for member in members:
            for step, loss in member["losses"]:
                windows.setdefault(-(-step // WINDOW) * WINDOW, []).append(loss)
        found.append(
            {
                "method": method,
                "regret": [
                    {who: mean(e[who] for e in same) for who in same[0]} for same in regrets
                ],
                "loss": [(last, mean(values)) for last, values in sorted(windows.items())],
            }
        )
    return found
