"""The experiments on controllers: which variants, and how one is trained and measured.

exp1: image tokens, adaptive against selectors. exp2: one axis, two or all three. exp3: how a
controller learns. Questions have short answers, so a question is right or wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.loading import load_model
from planner.models.running.skipping import obeying
from planner.models.scheduling import Scheduled, UnifiedSwitches, load_scheduler
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.plan_costs import PlanCosts
from planner.planning.selectors import stages_of
from planner.progress import Say
from planner.solver import Infeasible
from planner.training import unified
from planner.training.adallava import Learner
from planner.training.data import SceneQuestions
from planner.training.evaluate import TEXT_TOKENS, predict, score
from planner.training.experiments.forced_plans import (
    Batches,
    Forced,
    best_of_tried,
    best_static,
    packed,
    random_plan,
    under_one_plan,
)
from planner.training.experiments.kept_results import kept_or_measured
from planner.training.experiments.paired_bootstrap import paired_bootstrap
from planner.training.recipes import load_recipe
from planner.training.trainer import last_checkpoint
from planner.training.unified import UnifiedConfig

FAMILIES = ("existence", "attribute", "count", "spatial", "text")
# Of the validation split, on which static plans are chosen.
VALIDATION_QUESTIONS = 96
# Of the test questions, those that an oracle answers: it tries many plans.
ORACLE_QUESTIONS = 192
CONFIG = Path(__file__).parent.parent / "configs" / "unified.yaml"


@dataclass(frozen=True)
class Variant:
    """One line of a plot.

    Attributes:
        name: for users.
        settings: of the training configuration.
        start: name of the variant whose weights this one goes on from; "" for the base model.
        plans: ``controller``, or what takes its place on the same weights: ``static``, the best
            plan for all questions, ``random`` or ``oracle``; ``tuned`` is the static plan on the
            base model's weights, trained for it.
        selector: the text of a token selector that keeps n of N tokens; it runs on the base model.
    """

    name: str
    settings: tuple[str, ...] = ()
    start: str = ""
    plans: str = "controller"
    selector: Callable[[int, int], str] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Comparison:
    """An experiment: its variants, and which one the others are held against."""

    title: str
    budgets: tuple[float, ...]
    variants: tuple[Variant, ...]
    against: str


def _switches(text: str) -> tuple[str, ...]:
    return (f"switches={text}",)


_ALL = "tokens,layers,heads,mlp:groups=8"
# The axes on which every estimator works.
_ADDITIVE = "tokens,heads,mlp:groups=8"


def _method(method: str, *others: str) -> Variant:
    settings = (*_switches(_ADDITIVE), f"method={method}", "freeze_model=true", *others)
    return Variant(method.partition(":")[0], settings, "elastic")


# A step of a policy takes about seven thirds of the passes of an estimator's.
_FEWER = "max_steps=65"

COMPARISONS: Mapping[str, Comparison] = {
    "exp1": Comparison(
        "Image tokens: an adaptive controller against selectors",
        (0.8, 0.65, 0.55, 0.45, 0.35),
        (
            Variant("adaptive", _switches("tokens")),
            Variant("uniform, trained", _switches("tokens:scorer=uniform")),
            Variant("random, trained", _switches("tokens:scorer=random")),
            Variant("prumerge", selector=lambda n, of: f"prumerge:max={n / of}"),
            Variant("prumerge+", selector=lambda n, of: f"prumerge+:ratio={n / of}"),
            Variant("fastv", selector=lambda n, of: f"fastv:k=2,r={1 - n / of}"),
            Variant("visionzip", selector=lambda n, of: _visionzip(n)),
            Variant("uniform", selector=lambda n, of: f"uniform:keep={n}"),
            Variant("random", selector=lambda n, of: f"random:keep={n}"),
            Variant("downsample", selector=lambda n, of: f"downsample:side={isqrt(n)}"),
        ),
        "adaptive",
    ),
    "exp2": Comparison(
        "One axis, two or all three",
        (0.8, 0.65, 0.55, 0.45, 0.35, 0.25),
        (
            Variant("all", _switches(_ALL)),
            Variant("static", _switches(_ALL), plans="static"),
            Variant("random", _switches(_ALL), plans="random"),
            Variant("oracle", _switches(_ALL), plans="oracle"),
            Variant("tokens", _switches("tokens")),
            Variant("depth+width", _switches("tokens,layers,heads,mlp:groups=8,scorer=all")),
            Variant("width", _switches("tokens,heads,mlp:groups=8,scorer=all")),
            Variant("depth", _switches("tokens,layers:scorer=all")),
            Variant("static, tuned", _switches(_ALL), plans="tuned"),
        ),
        "all",
    ),
    "exp3": Comparison(
        "How a controller learns, on one elastic model",
        (0.65, 0.45, 0.3),
        (
            _method("gumbel:temperature=5"),
            _method("simple"),
            _method("imitation", _FEWER),
            _method("reinforce", _FEWER),
            _method("grpo", _FEWER),
            _method("ppo", _FEWER),
            Variant("elastic", _switches(_ADDITIVE)),
            Variant("random", _switches(_ADDITIVE), plans="random"),
        ),
        "gumbel",
    ),
}


def _visionzip(tokens: int) -> str:
    """In the paper's proportion: 54 dominant tokens of 64, the others contextual."""
    contextual = max(0, round(tokens * 10 / 64))
    return f"visionzip:dominant={tokens - contextual},contextual={contextual}"


@dataclass(eq=False)
class _Loaded:
    """A model, and what is known of it for all cells.

    Attributes:
        worth: of each switch, see `Forced.worth`; None until a static plan is wanted.
        pictures: see `Forced`.
    """

    model: Any
    processor: Any
    graph: Graph
    worth: Tensor | None = None
    pictures: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Measuring:
    """Variants of one seed, trained, loaded and measured when they are needed, and kept.

    Attributes:
        work: where models and cells are kept.
        seed: of the training runs and of the test questions.
        samples: test questions.
        overrides: of every training configuration.
        progress: told what comes next.
    """

    work: Path
    seed: int
    samples: int
    overrides: tuple[str, ...]
    progress: Say
    _loaded: dict[str, _Loaded] = field(default_factory=dict)
    _packed: dict[str, Batches] = field(default_factory=dict)

    def cell(self, comparison: Comparison, variant: Variant, budget: float) -> dict[str, Any]:
        """A variant at a budget, from its file or measured now; `right` has a digit a question."""
        label = f"{variant.name}_{variant.plans}_{budget:g}".replace(" ", "-").replace(",", "")
        identity = [repr(variant), budget, self.samples, list(self.overrides)]
        path = self.work / "controllers" / f"seed-{self.seed}" / f"{label}.json"

        def measure() -> dict[str, Any]:
            self.progress(f"seed {self.seed}: {variant.name} at {budget:g}")
            how = self._selected if variant.selector else self._controlled
            try:
                found = how(comparison, variant, budget)
            except Infeasible as why:
                found = {"infeasible": str(why)}
            return {"variant": variant.name, "budget": budget, "seed": self.seed, **found}

        return kept_or_measured(path, identity, measure)

    # -- models ------------------------------------------------------------------------------

    def _folder(self, settings: Sequence[str]) -> Path:
        label = "_".join(settings).replace("=", "-").replace(":", "-").replace(",", "-")
        label = "_".join([label, *(o.replace("=", "-").replace("/", "-") for o in self.overrides)])
        return self.work / "models" / f"unified_{label}_seed-{self.seed}"

    def _trained(self, comparison: Comparison, variant: Variant) -> Path:
        """The folder of a variant's model, trained before or now."""
        start = []
        if variant.start:
            first = next(v for v in comparison.variants if v.name == variant.start)
            start = [f"start={self._trained(comparison, first)}"]
        folder = self._folder(variant.settings)
        return self._train(variant.name, folder, [*start, *self.overrides, *variant.settings])

    def _train(
        self, name: str, folder: Path, settings: Sequence[str], learner: Learner | None = None
    ) -> Path:
        if not (folder / "model" / "scheduler.json").is_file():
            self.progress(f"seed {self.seed}: training {name}")
            places = [f"output_dir={folder / 'run'}", f"export_dir={folder / 'model'}"]
            _, config = load_recipe(CONFIG, [*places, f"seed={self.seed}", *settings])
            assert isinstance(config, UnifiedConfig)
            unified.train(config, learner or unified.learner)
        return folder / "model"

    def _trained_for(self, variant: Variant, budget: float, row: Tensor) -> Path:
        """The folder of the base model, trained for one plan."""
        folder = self._folder((*variant.settings, f"static={budget:g}"))
        settings = [*self.overrides, *variant.settings]
        name = f"{variant.name} at {budget:g}"
        return self._train(name, folder, settings, under_one_plan(row, Budget.of(budget)))

    def curve(self, comparison: Comparison, variant: Variant) -> list[tuple[int, float]]:
        """(step, mean loss of the plans drawn, in nats) of a variant's training."""
        checkpoint = last_checkpoint(self._trained(comparison, variant).parent / "run")
        assert checkpoint is not None
        history = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["log_history"]
        logged = [entry for entry in history if "loss" in entry]
        # A policy's own loss says nothing of its plans; the likelihood of answers is its reward.
        return [(e["step"], -e["reward"] if "reward" in e else e["loss"]) for e in logged]

    def _load(self, name: str) -> _Loaded:
        if name not in self._loaded:
            # One at a time: variants go through models in order.
            self._loaded.clear()
            model, processor, _ = load_model(name)
            self._loaded[name] = _Loaded(model, processor, lower_model(model, "model"))
        return self._loaded[name]

    # -- measures ----------------------------------------------------------------------------

    def _questions(self, split: str, count: int) -> SceneQuestions:
        return SceneQuestions(split, count, self.seed, FAMILIES)

    def _batches(self, split: str, count: int, processor: Any) -> Batches:
        """Questions as inputs, which are the same for all models of an experiment."""
        if split not in self._packed:
            self._packed[split] = packed(processor, self._questions(split, count))
        return self._packed[split]

    def _controlled(
        self, comparison: Comparison, variant: Variant, budget: float
    ) -> dict[str, Any]:
        """Of a controller, or of other plans on its weights."""
        static = None
        if variant.plans in ("oracle", "tuned"):
            same = next(v for v in comparison.variants if v.plans == "static")
            static = torch.tensor(self.cell(comparison, same, budget)["plan"])
        if variant.plans == "tuned":
            assert static is not None
            folder = self._trained_for(variant, budget, static)
        else:
            folder = self._trained(comparison, variant)
        known = self._load(str(folder))
        graph, load = known.graph, _workload(known.graph)
        scheduled = Scheduled(known.model, graph, load_scheduler(folder, graph), mask=True)
        layout = scheduled.scheduler.layout.under(load)
        assert isinstance(layout, UnifiedSwitches)
        forced = Forced(scheduled, layout, Budget.of(budget), known.pictures)
        test = self._batches("test", self.samples, known.processor)
        if variant.plans == "oracle":
            assert static is not None
            some = test[: -(-ORACLE_QUESTIONS // len(test[0]["labels"]))]
            found = best_of_tried(forced, some, static, self.seed)
        else:
            if variant.plans == "static":
                few = self._batches("val", VALIDATION_QUESTIONS, known.processor)
                if known.worth is None:
                    known.worth = forced.worth(few[:1])
                static = best_static(forced, few, known.worth)
            if static is not None:
                forced.plan_all(static)
            elif variant.plans == "random":
                random_plan(forced, self.seed)
            found = forced.answers(test)
        costs = PlanCosts(graph, load, "llm")
        if static is not None and variant.plans != "oracle":
            # It has no controller, and pays for none.
            plan = forced.on_grid.plan(static, Plan.of(graph))
            share = costs.of(plan)["flops"]["fraction"]
            used = {"cost_fraction": share, "utilisation": share / budget, "plan": static.tolist()}
            beyond = int(share > budget) * len(found.rows)
        else:
            limit = layout.limit(forced.budget)
            spent = [layout.spent(row) for row in found.rows]
            whole = costs.of(Plan.of(graph))["flops"]["base"]
            used = {
                "cost_fraction": (float(np.mean(spent)) + layout.always) / whole,
                "utilisation": layout.utilisation(spent, limit),
            }
            beyond = sum(each > limit for each in spent)
        plans = len(found.rows.unique(dim=0))
        summary = _summary(found.right.numpy())
        return {
            **summary,
            "loss": float(found.loss.mean()),
            **used,
            "violations": beyond,
            "plans": plans,
        }

    def _selected(self, comparison: Comparison, variant: Variant, budget: float) -> dict[str, Any]:
        """Of a selector on the base model, with as many tokens as the budget allows."""
        _, config = load_recipe(CONFIG, self.overrides)
        known = self._load(config.model_dump()["model"])
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
        questions = self._questions("test", self.samples)
        with obeying(known.model, graph, plan):
            answers = predict(known.model, known.processor, questions)
        right = [score(q.turns[0], a) for q, a in zip(questions, answers, strict=True)]
        used = {"cost_fraction": share, "utilisation": share / budget}
        return {**_summary(np.array(right)), **used, "violations": 0, "plans": 1}


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
            yield {"variant": variant, "against": against, "budget": budget, **found}


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
