"""Labels: what switches are worth to each sample, measured, and the plan that follows from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from planner.audit import Labels, Terms, decide, worth
from planner.audit.surrogate import all_plans
from planner.documents import digest_of
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.calibration import Sample, weights_digest
from planner.models.calibration.leave_one_out import Switch, losses_without
from planner.models.calibration.replay import NOT_FINITE, Replay
from planner.models.calibration.store import Store
from planner.models.running.masked import MaskedExecutor
from planner.models.scheduling import Deciding, Scheduled
from planner.planning.switches import with_switches
from planner.solver.problem import Flags, Floats, Problem
from planner.spread import Here, Spread
from planner.training.question_samples import prompt_of

# Switches of which every plan may be tried: 4,096 plans per sample.
_MOST_SWITCHES = 12


def label_samples(
    model: nn.Module,
    graph: Graph,
    samples: Sequence[tuple[str, Sample]],
    terms: Terms,
    budgets: Sequence[float],
    *,
    tried: int = 0,
    batch: int = 16,
    scheduled: Scheduled | None = None,
    spread: Spread[Deciding] | None = None,
    partial: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Labels:
    """Measure every sample and decide its plan for every budget.

    Args:
        model: dense, in evaluation mode; left as it was.
        samples: name and contents, with the true answer.
        budgets: fractions of the base model.
        tried: of how many samples every plan's true loss is measured as well.
        batch: plans that run at once.
        scheduled: makes the plans; None for the heuristic.
        spread: has loaded the same; None measures here.
        partial: where to keep partial results; the same call continues from them.

    Raises InputError: bad arguments, outputs that are not finite, or a budget that cannot be met.
    """
    problems = {budget: terms.problem(graph, budget) for budget in budgets}
    names = next(iter(problems.values())).switch_names
    if not samples or not names:
        raise InputError("labels need at least one sample, and a model with something to switch")
    if tried and (len(names) > _MOST_SWITCHES or any("[" in name for name in names)):
        raise InputError(
            f"every plan can be tried for at most {_MOST_SWITCHES} layers, not for the "
            f"{len(names)} switches of {terms.switches}"
        )
    count = len(samples)
    shapes: dict[str, tuple[int, ...]] = {"utilities": (count, len(names))}
    if tried:
        shapes["losses"] = (min(tried, count), 1 << len(names))
    if scheduled is not None:
        shapes["plans"] = (count, len(budgets), len(names))
    store = Store(partial, _key(terms, budgets, samples, model, scheduled), shapes)
    arrays = store.arrays.values()
    missing = [i for i in range(count) if any(np.isnan(a[i : i + 1]).any() for a in arrays)]
    progress(count - len(missing), count)
    spread = spread or Here(Deciding(model, None, graph, scheduled))
    make = functools.partial(_Measuring, terms=terms, names=names, budgets=budgets, batch=batch)
    try:
        found = spread(make, [(samples[index][1], index < tried) for index in missing])
        for done, (item, measured) in enumerate(found, 1):
            for name, values in measured.items():
                store.arrays[name][missing[item]] = values
            store.save()
            progress(count - len(missing) + done, count)
    finally:
        store.save(now=True)
    labels = _labels(terms, names, [name for name, _ in samples], problems, store.arrays)
    store.remove()
    return labels


class _Measuring:
    """Measures samples, one by one; the arguments are those of `label_samples`."""

    def __init__(
        self,
        loaded: Deciding,
        terms: Terms,
        names: Sequence[str],
        budgets: Sequence[float],
        batch: int,
    ) -> None:
        self._executor = MaskedExecutor(loaded.model, loaded.graph)
        self._switches = _switches(with_switches(loaded.graph, terms.mlp_groups), names)
        self._scheduled = loaded.scheduled
        self._budgets, self._batch = budgets, batch

    def __call__(self, item: tuple[Sample, bool]) -> dict[str, Floats]:
        """What is kept of a sample: ``utilities``, and ``losses`` if all plans are to be tried."""
        sample, is_tried = item
        count = len(self._switches)
        wanted = {"utilities": ~np.eye(count, dtype=np.bool_)}
        if is_tried:
            wanted["losses"] = all_plans(count)
        rows = min(self._batch, max(map(len, wanted.values())))
        replay = Replay(self._executor.model, self._executor.layers, sample, rows)
        found = {name: self._loss_changes(replay, plans) for name, plans in wanted.items()}
        if self._scheduled is not None:
            found["plans"] = _scheduled_plans(self._scheduled, sample, self._budgets)
        return found

    def _loss_changes(self, replay: Replay, plans: Flags) -> Floats:
        """Change of the loss under plans (plans, switches), in nats per answer token."""
        off = [[s for s, on in zip(self._switches, plan, strict=True) if not on] for plan in plans]
        changes = losses_without(self._executor, replay, off, "loss")
        if not np.isfinite(changes).all():
            raise InputError(NOT_FINITE)
        return changes


def _switches(graph: Graph, names: Sequence[str]) -> list[Switch]:
    """The Graph's switches that a problem's names stand for."""
    found = []
    for name in names:
        site, _, index = name.partition("[")
        found.append(Switch(graph.sites_by_name[site], int(index.rstrip("]") or 0)))
    return found


@torch.no_grad()
def _scheduled_plans(scheduled: Scheduled, sample: Sample, budgets: Sequence[float]) -> Floats:
    """The scheduler's plan under every budget, shape (budgets, switches), from one pass."""
    prompt = prompt_of(sample, len(budgets))
    with scheduled.using(list(budgets)):
        scheduled.model(**prompt, use_cache=False)
        assert scheduled.taken is not None
        return scheduled.taken.double().cpu().numpy()


def _labels(
    terms: Terms,
    names: tuple[str, ...],
    samples: Sequence[str],
    problems: dict[float, Problem],
    arrays: dict[str, Floats],
) -> Labels:
    """By sample, then by budget."""
    plans: list[Flags] = []
    costs, limits = [], []
    losses: dict[int, Floats] = {}
    for index in range(len(samples)):
        for place, problem in enumerate(problems.values()):
            problem = problem.with_utilities(worth(arrays["utilities"][index]))
            flags = decide(problem) if "plans" not in arrays else arrays["plans"][index, place] > 0
            if "losses" in arrays and index < len(arrays["losses"]):
                losses[len(plans)] = arrays["losses"][index]
            plans.append(flags)
            costs.append(int(problem.cost(problem.choice_of(flags))[0]))
            limits.append(int(problem.limits[0]))
    return Labels(
        terms=terms,
        switches=names,
        samples=tuple(name for name in samples for _ in problems),
        budgets=np.array(list(problems) * len(samples)),
        utilities=np.repeat(arrays["utilities"], len(problems), axis=0),
        plans=np.array(plans),
        costs=np.array(costs, dtype=np.int64),
        limits=np.array(limits, dtype=np.int64),
        losses=losses,
    )


def _key(
    terms: Terms,
    budgets: Sequence[float],
    samples: Sequence[tuple[str, Sample]],
    model: nn.Module,
    scheduled: Scheduled | None,
) -> str:
    """Equal for calls that give equal labels."""
    facts = [repr(terms), list(budgets), [(name, sample.digest()) for name, sample in samples]]
    modules = [model] if scheduled is None else [model, scheduled.scheduler]
    return digest_of([*facts, *map(weights_digest, modules)])
