"""A warm start: the scheduler alone learns the plans of a file of labels, before joint training.

    planner labels --model tiny-llava -o labels.parquet
    planner train training/configs/adallava-l.yaml --set labels=labels.parquet

The model is frozen. A prompt is read as when it is asked, with the latency token at its end, and no
further than the scheduler's logits. A plan is a set of switches, and the loss is its negative
log-likelihood among all sets of equal size, where a set's probability is proportional to the
product of exp(logit) over its switches: the distribution of the estimator ``simple``. Gradients
reach the scheduler's head and, through the frozen layers, the latency encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from planner.audit import Labels
from planner.ir.errors import InputError
from planner.models.scheduling import (
    CostSwitches,
    LayerSwitches,
    Layout,
    Scheduled,
    UnifiedSwitches,
)
from planner.models.scheduling.token_choice import ChosenTokens
from planner.models.scheduling.vision_controller import TokenScores
from planner.models.tokens.selectors import DecoderInputs
from planner.planning.budgets import Budget
from planner.solver.problem import Flags
from planner.training.question_samples import Asked, prompt_of
from planner.training.subset_distributions import Subsets
from planner.training.trainer import RunTrainer


def warm_start(
    scheduled: Scheduled,
    labels: Labels,
    asked: Asked,
    arguments: TrainingArguments,
    encoder_rate: float,
) -> None:
    """Train a scheduler on labels, or load it if that was done; its model stays as it is.

    Args:
        scheduled: the model under its scheduler, which decides by `stop`; nothing attached.
        labels: what `planner labels` wrote.
        asked: finds the samples that they are about.
        arguments: of the training; a batch counts samples, each under all of its budgets.
        encoder_rate: learning rate of the latency encoder, whose token predicts the answer too.

    Raises InputError: the labels are of another model or of other switches.
    """
    layout = scheduled.layout
    trainer = RunTrainer(
        model=Pupil(scheduled),
        args=arguments,
        train_dataset=LabelledPrompts(labels, layout, asked),
        data_collator=_collate,
        rates={"scheduler.encoder.": encoder_rate},
    )
    scheduled.attach_limits(torch.tensor([layout.steps]))
    try:
        with _frozen(scheduled.model):
            trainer.run()
    finally:
        scheduled.detach()


def set_loss(logits: Tensor, plans: Tensor) -> Tensor:
    """Negative log-likelihood of sets of switches, given how many they hold, in nats.

    Of logits and plans (batch, switches); shape (batch,), 0 where nothing or everything is on.
    """
    costs = torch.ones_like(plans, dtype=torch.int64)
    subsets = Subsets.of(logits, costs, plans.sum(-1), columns=plans.shape[1])
    return -subsets.log_probability(plans).float()


# -- what is learned -------------------------------------------------------------------------------


def target_plans(labels: Labels, layout: Layout) -> Flags:
    """The plans that the scheduler should learn, shape (labels, size).

    Labels for the scheduler's own switches hold these plans. For other labels, the scheduler's rule
    makes plans of the utilities that were measured: ``adallava-h``, for one, has no labels of its
    own, but its heads and MLP groups have utilities. Raises InputError: labels of another model, or
    without a utility for some switch.
    """
    labels.problems(layout.graph)
    names = layout.switch_names
    if labels.switches == names:
        return labels.plans
    place = {name: index for index, name in enumerate(labels.switches)}
    sites = {_site(name) for name in names}
    # A site's groups may be more or fewer here than there.
    there = [name for name in labels.switches if _site(name) in sites]
    if differ := sorted(set(names) ^ set(there)):
        raise InputError(
            f"the labels of the switches {labels.terms.switches} do not fit a scheduler of "
            f"{layout.name}, for one in {differ[0]}: label with {_options(layout)}"
        )
    worth = torch.from_numpy(labels.utilities[:, [place[name] for name in names]])
    plans: Flags = layout.decide(worth, _limits(labels, layout)).numpy()
    return plans


def _site(name: str) -> str:
    return name.partition("[")[0]


def _options(layout: Layout) -> str:
    """Options of `planner labels` that make labels for a layout."""
    if isinstance(layout, LayerSwitches):
        return f"--switches {layout.name}"
    axes = ",".join(layout.axes) if isinstance(layout, CostSwitches) else "heads,mlp"
    groups = sum(_site(name) == f"mlp.{layout.first}" for name in layout.switch_names)
    return f"--switches {axes}" + (f" --mlp-groups {groups}" if groups else "")


def _limits(labels: Labels, layout: Layout) -> Tensor:
    """In the layout's measure, shape (labels,)."""
    known = {budget: layout.limit(Budget.of(budget)) for budget in set(labels.budgets.tolist())}
    return torch.tensor([known[budget] for budget in labels.budgets.tolist()])


class LabelledPrompts(Sequence[dict[str, Any]]):
    """One item a sample: its prompt, repeated for each of its budgets, and the plans to learn."""

    def __init__(self, labels: Labels, layout: Layout, asked: Asked) -> None:
        self._asked = asked
        if isinstance(layout, UnifiedSwitches):
            # Labels are measured with all image tokens.
            whole = layout.open_counts(_limits(labels, layout))[:, -1]
            labels = labels.some(whole.nonzero()[:, 0].tolist())
            if not len(labels):
                raise InputError("no budget of the labels leaves room for all image tokens")
        self._plans = torch.from_numpy(target_plans(labels, layout.inner))
        self._limits = _limits(labels, layout)
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(labels.samples):
            rows.setdefault(name, []).append(row)
        self._rows = list(rows.items())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        name, rows = self._rows[index]
        return {
            "id": name,
            "prompt": prompt_of(self._asked(name), len(rows)),
            "limits": self._limits[rows],
            "plans": self._plans[rows],
        }


def _collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Prompts stay apart: no padding, and any model's inputs."""
    return {
        "prompts": [item["prompt"] for item in items],
        "limits": [item["limits"] for item in items],
        "plans": torch.cat([item["plans"] for item in items]),
        "ids": [item["id"] for item in items],
    }


# -- how it is learned -----------------------------------------------------------------------------


class Decided(Exception):
    """Ends a pass as soon as there are logits, and carries them with their limits."""


def stop(logits: Tensor, limits: Tensor) -> Tensor:
    """What a scheduler that is taught decides by."""
    raise Decided(logits, limits)


def keep_all_tokens(scores: TokenScores, limits: Tensor, inputs: DecoderInputs) -> ChosenTokens:
    """What a vision side decides while the switches are taught."""
    last = torch.full_like(limits, scores.counts.shape[1] - 1)
    return ChosenTokens(last, torch.ones_like(scores.image))


class Pupil(nn.Module):
    """A scheduler to train, with a model that is not trained; it decides by `stop`."""

    def __init__(self, scheduled: Scheduled) -> None:
        super().__init__()
        self.scheduler = scheduled.scheduler
        self._scheduled = scheduled

    def forward(
        self, prompts: Sequence[dict[str, Any]], limits: Sequence[Tensor], plans: Tensor
    ) -> dict[str, Tensor]:
        """The mean loss of samples: inputs with rows alike, their limits, and all rows' plans."""
        each = zip(prompts, limits, strict=True)
        logits = torch.cat([self._logits(prompt, limit) for prompt, limit in each])
        return {"loss": set_loss(logits, plans).mean()}

    def _logits(self, prompt: dict[str, Any], limits: Tensor) -> Tensor:
        self._scheduled.limits = limits
        try:
            self._scheduled.model(**prompt, use_cache=False)
        except Decided as decided:
            logits: Tensor = decided.args[0]
            return logits
        raise AssertionError("the scheduler was not asked")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
