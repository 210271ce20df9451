"""One cell of a comparison of controllers after the other: trained, measured, kept.

Questions have short answers, so a question is right or wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.scheduling import Deciding, Scheduled, UnifiedSwitches, load_scheduler
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.plan_costs import PlanCosts
from planner.planning.request import Request
from planner.planning.selectors import stages_of
from planner.solver import Infeasible
from planner.training import unified
from planner.training.adallava import Learner
from planner.training.config import CONFIGS
from planner.training.data import SceneQuestions
from planner.training.evaluate import TEXT_TOKENS, UnderBudgets
from planner.training.experiments.comparisons import Comparison, Variant
from planner.training.experiments.forced_plans import (
    Answered,
    Batches,
    Forced,
    beginning_with,
    best_of_tried,
    best_static,
    packed,
    random_plan,
    under_one_plan,
)
from planner.training.experiments.kept_results import (
    Bench,
    kept,
    kept_or_measured,
    losses_logged,
)
from planner.training.experiments.over_seeds import paired_bootstrap
from planner.training.experiments.published_cells import Published, digest
from planner.training.recipes import load_recipe
from planner.training.unified import UnifiedConfig

FAMILIES = ("existence", "attribute", "count", "spatial", "text")
# Of the validation split, on which static plans are chosen.
VALIDATION_QUESTIONS = 96
# Of the test questions, those that an oracle answers: it tries many plans.
ORACLE_QUESTIONS = 192
CONFIG = CONFIGS / "unified.yaml"
# A file that every model with its controller has.
_MARKS = "scheduler.json"


@dataclass(frozen=True, eq=False)
class Measuring(Bench):
    """Variants of controllers, of one seed."""

    published: Published = field(default_factory=Published)
    _packed: dict[str, Batches] = field(default_factory=dict)

    def cell(self, comparison: Comparison, variant: Variant, budget: float) -> dict[str, Any]:
        """A variant at a budget, known or measured now; `right` has a digit a question."""
        known = self.known(variant, budget)
        if known is not None and ("right" in known or "infeasible" in known):
            return known

        def measure() -> dict[str, Any]:
            self.say(f"{variant.name} at {budget:g}")
            how = self._selected if variant.selector else self._controlled
            try:
                found = how(comparison, variant, budget)
            except Infeasible as why:
                found = {"infeasible": str(why)}
            return {"variant": variant.name, "budget": budget, "seed": self.seed, **found}

        return kept_or_measured(*self._file(variant, budget), measure)

    def known(self, variant: Variant, budget: float) -> dict[str, Any] | None:
        """A cell that was measured before, here or elsewhere; of older pages without digits."""
        path, identity = self._file(variant, budget)
        return kept(path, identity) or self.published.rows.get((self.seed, digest(identity)))

    def digest(self, variant: Variant, budget: float) -> str:
        """Of what a cell is of."""
        return digest(self._file(variant, budget)[1])

    def _file(self, variant: Variant, budget: float) -> tuple[Path, list[Any]]:
        """A cell's file, and what it must be of."""
        label = f"{variant.name}_{variant.plans}_{budget:g}".replace(" ", "-").replace(",", "")
        identity = [repr(variant), budget, self.samples, self.changes]
        return self.work / "controllers" / f"seed-{self.seed}" / f"{label}.json", identity

    # -- models ------------------------------------------------------------------------------

    def variant_trained(self, comparison: Comparison, variant: Variant) -> Path:
        """The folder of a variant's model, trained before or now; InputError where it cannot be."""
        try:
            return self._train(comparison, variant, variant.name)
        except Infeasible as why:
            # No cell of it could be had, at any budget.
            raise InputError(f"'{variant.name}' cannot be trained: {why}") from None

    def is_trained(self, variant: Variant) -> bool:
        """Whether a variant's model was trained here before."""
        return self.has_trained(self._label(variant), _MARKS)

    def _train(
        self,
        comparison: Comparison,
        variant: Variant,
        name: str,
        more: Sequence[str] = (),
        also: Sequence[str] = (),
        learner: Learner = unified.learner,
    ) -> Path:
        """The folder of a variant's model, with more settings; `also` as of `_label`."""
        start = []
        if variant.start:
            first = next(v for v in comparison.variants if v.name == variant.start)
            start = [f"start={self.variant_trained(comparison, first)}"]
        settings = (*variant.settings, *more)

        def train(places: list[str]) -> None:
            _, config = load_recipe(CONFIG, [*places, *start, *self.overrides, *settings])
            assert isinstance(config, UnifiedConfig)
            unified.train(config, learner)

        return self.trained(name, self._label(variant, more, also), _MARKS, train)

    def _label(self, variant: Variant, more: Sequence[str] = (), also: Sequence[str] = ()) -> str:
        """Of a variant's model, with more settings; `also` tells it from others."""
        begun = [f"from={variant.start}"] if variant.start else []
        told = "_".join([*variant.settings, *more, *also, *begun])
        label = told.replace("=", "-").replace(":", "-").replace(",", "-")
        others = (o.replace("=", "-").replace("/", "-") for o in self.changes)
        return "_".join([f"unified_{label}", *others])

    def _trained_for(
        self, comparison: Comparison, variant: Variant, budget: float, row: Tensor | None
    ) -> Path:
        """The folder of a model trained at one budget.

        For one plan, or with its controller, which may begin with that plan.
        """
        name = f"{variant.name} at {budget:g}"
        if variant.plans == "tuned":
            assert row is not None
            learner = under_one_plan(row, Budget.of(budget))
            return self._train(comparison, variant, name, (), (f"static={budget:g}",), learner)
        only = f"least_budget={budget:g}", f"most_budget={budget:g}"
        if row is None:
            return self._train(comparison, variant, name, only)
        return self._train(comparison, variant, name, only, ("from=static",), beginning_with(row))

    def curve(self, comparison: Comparison, variant: Variant) -> list[tuple[int, float]]:
        """(step, mean loss of the plans drawn, in nats) of a variant's training."""
        logged = losses_logged(self.variant_trained(comparison, variant).parent / "run")
        # A policy's own loss says nothing of its plans; the likelihood of answers is its reward.
        return [(e["step"], -e["reward"] if "reward" in e else e["loss"]) for e in logged]

    # -- measures ----------------------------------------------------------------------------

    def questions(self, split: str, count: int) -> SceneQuestions:
        """Of the seed."""
        return SceneQuestions(split, count, self.seed, FAMILIES)

    def batches(self, split: str, count: int, processor: Any) -> Batches:
        """Questions as inputs, which are the same for all models of an experiment."""
        if split not in self._packed:
            self._packed[split] = packed(processor, self.questions(split, count))
        return self._packed[split]

    def forced(self, folder: Path, budget: float) -> Forced:
        """A trained model, whose controller decides until something else is forced on it."""
        known = self.load(str(folder))
        graph = known.graph
        scheduled = Scheduled(known.model, graph, load_scheduler(folder, graph), mask=True)
        layout = scheduled.scheduler.layout.under(_workload(graph))
        assert isinstance(layout, UnifiedSwitches)
        return Forced(scheduled, layout, Budget.of(budget), known.notes.setdefault("pictures", {}))

    def _controlled(
        self, comparison: Comparison, variant: Variant, budget: float
    ) -> dict[str, Any]:
        """Of a controller, or of other plans on its weights."""
        static = None
        if variant.plans in ("oracle", "tuned", "tuned from static"):
            chosen = static_beside(comparison, variant)
            static = torch.tensor(self.cell(comparison, chosen, budget)["plan"])
        if variant.plans.startswith("tuned"):
            folder = self._trained_for(comparison, variant, budget, static)
        else:
            folder = self.variant_trained(comparison, variant)
        forced, known = self.forced(folder, budget), self.load(str(folder))
        test = self.batches("test", self.samples, known.processor)
        few = self.batches("val", VALIDATION_QUESTIONS, known.processor)
        if variant.plans == "static":
            if "worth" not in known.notes:
                known.notes["worth"] = forced.worth(few[:1])
            static = best_static(forced, few, known.notes["worth"])
        if variant.plans == "oracle":
            assert static is not None
            some = test[: -(-ORACLE_QUESTIONS // len(test[0]["labels"]))]
            return self._summed_up(forced, best_of_tried(forced, some, static, self.seed), None)
        if variant.plans == "tuned from static":
            static = None
        if static is not None:
            forced.plan_all(static)
        elif variant.plans == "random":
            random_plan(forced, self.seed)
        elif variant.plans == "same switches":
            forced.fix_switches(forced.mean_logits(few))
        elif variant.plans == "grid":
            forced.fix_tokens()
        return self._summed_up(forced, forced.answers(test), static)

    def _summed_up(self, forced: Forced, found: Answered, static: Tensor | None) -> dict[str, Any]:
        """A cell's numbers; a static plan has no controller, and pays for none."""
        layout = forced.layout
        costs = PlanCosts(layout.graph, layout.load, "llm")
        used: dict[str, Any]
        if static is None:
            limit = layout.limit(forced.budget)
            spent = [layout.spent(row) for row in found.rows]
            whole = costs.of(Plan.of(layout.graph))["flops"]["base"]
            used = {
                "cost_fraction": (float(np.mean(spent)) + layout.always) / whole,
                "utilisation": layout.utilisation(spent, limit),
                "violations": sum(each > limit for each in spent),
            }
        else:
            plan = forced.on_grid.plan(static, Plan.of(layout.graph))
            share = costs.of(plan)["flops"]["fraction"]
            budget = float(forced.budget.limits[0].value)
            used = {
                "plan": static.tolist(),
                "cost_fraction": share,
                "utilisation": share / budget,
                "violations": int(share > budget) * len(found.rows),
            }
        return {
            **_summary(found.right.numpy()),
            "loss": float(found.loss.mean()),
            **used,
            "plans": len(found.rows.unique(dim=0)),
        }

    def _selected(self, comparison: Comparison, variant: Variant, budget: float) -> dict[str, Any]:
        """Of a selector on the base model, with as many tokens as the budget allows."""
        _, config = load_recipe(CONFIG, self.overrides)
        known = self.load(config.model_dump()["model"])
        graph, load = known.graph, _workload(known.graph)
        costs = PlanCosts(graph, load, "llm")
        assert variant.selector is not None
        of = load.image_tokens
        for count in range(of, 0, -1):
            try:
                stages = stages_of(variant.selector(count, of), of, load.image_tokens_per_run)
            except InputError:
                # The selector cannot keep so few, or so many.
                continue
            plan = Plan.of(graph, tokens=stages)
            share = costs.of(plan)["flops"]["fraction"]
            if share <= budget:
                break
        else:
            raise Infeasible(f"{variant.name} cannot keep to {budget:g}")
        questions = self.questions("test", self.samples)
        deciding = Deciding(known.model, known.processor, graph)
        request = Request("model", text_tokens=TEXT_TOKENS, new_tokens=0)
        # An adaptive selector may keep less than its plan counts with.
        found, share = UnderBudgets(deciding, questions, request).under(plan)
        used = {"cost_fraction": share, "utilisation": share / budget}
        return {**_summary(np.array(found["scores"])), **used, "violations": 0, "plans": 1}


def static_beside(comparison: Comparison, variant: Variant) -> Variant:
    """The static plan that is chosen on the weights that a variant has, or goes on from."""
    plans = [v for v in comparison.variants if v.plans == "static"]
    first = next((v for v in comparison.variants if v.name == variant.start), variant)
    return next((v for v in plans if v.settings == first.settings), plans[0])


def _workload(graph: Graph) -> Workload:
    return Workload.default(graph, text_tokens=TEXT_TOKENS, new_tokens=0)


def _summary(right: npt.NDArray[Any]) -> dict[str, Any]:
    """Accuracy, overall and by family, and each question's digit."""
    families = {name: right[index :: len(FAMILIES)] for index, name in enumerate(FAMILIES)}
    return {
        "accuracy": float(right.mean()),
        "families": {name: float(values.mean()) for name, values in families.items()},
        "right": "".join(str(round(value)) for value in right.tolist()),
    }


def compared(
    rows: Sequence[Mapping[str, Any]], against: str, resamples: int = 2000
) -> Iterator[dict[str, Any]]:
    """Every variant's accuracy less that of one of them, at each budget: a paired bootstrap.

    Seeds are resampled, and in each the questions, which both variants were asked: the first ones,
    where one of them was asked fewer.
    """
    cells = {(r["variant"], r["budget"], r["seed"]): _digits(r) for r in rows if "right" in r}
    variants = dict.fromkeys(row["variant"] for row in rows)
    for variant in variants:
        for budget in dict.fromkeys(row["budget"] for row in rows):
            pairs = [
                digits - cells[against, budget, seed][: len(digits)]
                for (name, at, seed), digits in cells.items()
                if (name, at) == (variant, budget) and (against, budget, seed) in cells
            ]
            if variant == against or not pairs:
                continue
            found = paired_bootstrap(pairs, resamples)
            told = {"variant": variant, "against": against, "budget": budget}
            yield {**told, "runs": len(pairs), **found}


def _digits(row: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    return np.array([float(digit) for digit in row["right"]])


def steps_to_stable(curve: Sequence[tuple[int, float]]) -> int | None:
    """The first logged step from which the loss stays within a tenth of its fall from its end.

    None where it never fell.
    """
    if len(curve) < 2 or curve[0][1] <= curve[-1][1]:
        return None
    end = float(np.mean([loss for _, loss in curve[-3:]]))
    within = 0.1 * (curve[0][1] - end)
    stable = None
    for step, loss in reversed(curve):
        if loss > end + within:
            break
        stable = step
    return stable
