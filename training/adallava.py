"""AdaLLaVA: a scheduler and its model trained together (arXiv 2503.10905).

    planner train training/configs/adallava-l.yaml [--set learning_rate=1e-4 ...]

Every sample gets a budget, drawn uniformly from 0 to everything. The scheduler draws a plan within
it, masks carry the plan out, and the gradient of the answer's cross-entropy reaches the decoder
and, through the estimator, the scheduler. The result is a folder with a checkpoint that stock
transformers loads, its processor, and the scheduler.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn
from transformers import set_seed

from planner.audit import Labels, read_labels
from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.models.scheduling import (
    Layout,
    Scheduled,
    Scheduler,
    UnifiedSwitches,
    UnitSwitches,
    save_scheduler,
)
from planner.models.scheduling.token_choice import ChosenTokens
from planner.models.scheduling.vision_controller import TokenScores
from planner.models.tokens.selectors import DecoderInputs
from planner.planning.budgets import Budget
from planner.training.config import Count, Rate, Share
from planner.training.conversation_runs import (
    ConversationConfig,
    arguments_of,
    conversations_of,
    export_model,
    facts_of,
    load_base,
)
from planner.training.data import LlavaConversations, Packer
from planner.training.data.packing import IGNORE
from planner.training.data.visits import Visit, Visited, Visits
from planner.training.estimators import Deterministic, Estimator, GumbelSequential, parse
from planner.training.question_samples import Asked
from planner.training.run_folders import begun
from planner.training.switch_costs import costs_of
from planner.training.token_draws import draw_tokens
from planner.training.trainer import RunTrainer
from planner.training.warm_start import keep_all_tokens, stop, warm_start


class AdaLlavaConfig(ConversationConfig):
    """Everything that makes one AdaLLaVA model."""

    recipe: str = "adallava"
    switches: str = "adallava-l"
    estimator: str = "gumbel:temperature=5"
    # Tokens of a question besides the image, which budgets in cost are for; by default 64.
    text_tokens: Count | None = None
    # The smallest and the largest budget that samples get, as fractions of the base model.
    least_budget: Share = 0.0
    most_budget: Share = 1.0

    scheduler_learning_rate: Rate | None = None
    # Train the scheduler alone.
    freeze_model: bool = False

    # A file of `planner labels`, which the scheduler learns first, alone; and the pictures and
    # questions that its labels are about, if they are not about drawn scenes.
    labels: Path | None = None
    label_images: Path | None = None
    label_prompts: Path | None = None
    label_steps: Count = 200
    label_learning_rate: Rate = 4e-3
    label_encoder_learning_rate: Rate = 2e-4

    @model_validator(mode="after")
    def _fits(self) -> Self:
        parse(self.estimator)
        if self.least_budget > self.most_budget:
            raise InputError(
                f"least_budget={self.least_budget:g} and most_budget={self.most_budget:g}: the "
                "first is at most the second"
            )
        return self


class AdaptiveModel(nn.Module):
    """A stock model and its scheduler as one module to train; an estimator draws the plans.

    `load` is what budgets in cost are for, see `Layout.under`.
    """

    trainer: ClassVar[type[RunTrainer]] = RunTrainer

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        scheduler: Scheduler,
        estimator: Estimator,
        load: Workload | None = None,
    ) -> None:
        super().__init__()
        if isinstance(scheduler.layout, UnitSwitches) and not isinstance(
            estimator, GumbelSequential
        ):
            raise InputError(f"{scheduler.layout.name} draws units: its estimator is gumbel")
        self.model = model
        self.scheduler = scheduler
        self.estimator = estimator
        self.layout = scheduler.layout.under(load) if load else scheduler.layout
        self._costs = costs_of(self.layout)
        # What the token counts drawn leave for the switches, see `DrawnTokens`.
        self._allowance: Tensor | None = None
        # Since the last log: how many plans were drawn, the sum of their utilisations, and how many
        # were beyond their limit.
        self.tally = torch.zeros(3, dtype=torch.float64)
        self._seeds: Tensor | None = None
        self.scheduled = Scheduled(
            model, graph, scheduler, mask=True, decide=self._draw, decide_tokens=self._draw_tokens
        )
        self.scheduled.attach_limits(torch.tensor([self.layout.steps]), layout=self.layout)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether its loss is divided by a step's tokens, see `RunTrainer`; a penalty is not."""
        return not isinstance(self.estimator, Deterministic)

    def forward(self, labels: Tensor, limits: Tensor, seeds: Tensor, **inputs: Any) -> Any:
        """The stock model's output with its loss, under plans drawn within limits.

        Args:
            labels: shape (batch, tokens); the latency token stands before the last answer.
            limits: shape (batch,), in the layout's measure.
            seeds: shape (batch,): of every sample's noise, so that draws do not depend on a batch.
        """
        self.scheduled.at = last_answer(labels)
        self.scheduled.limits = limits
        self._seeds = seeds
        output = self.model(**inputs, labels=labels, use_cache=False)
        if isinstance(self.estimator, Deterministic):
            taken = self.scheduled.taken
            assert taken is not None
            output.loss = output.loss + self.estimator.penalty(taken, self._costs, limits).mean()
        return output

    def _draw(self, logits: Tensor, limits: Tensor) -> Tensor:
        layout, estimator = self.layout, self.estimator
        assert self._seeds is not None
        noise = [torch.Generator().manual_seed(int(seed)) for seed in self._seeds]
        chosen = self.scheduled.chosen
        options = None if chosen is None else chosen.options
        if isinstance(layout, UnitSwitches):
            assert isinstance(estimator, GumbelSequential)
            gates = estimator.draw_units(logits, limits, layout.heads, layout.rank, noise)
        else:
            costs = self._costs if options is None else costs_of(layout, options)
            gates = estimator.draw(logits, costs, limits, noise).gates
        rows = layout.decision(gates.detach() > 0.5, options)
        for row, limit in zip(rows, self.scheduled.limits.tolist(), strict=True):
            spent = layout.spent(row)
            used = layout.utilisation([spent], limit)
            self.tally += torch.tensor([1, used, spent > limit], dtype=self.tally.dtype)
        return gates if self._allowance is None else gates * self._allowance[:, None]

    def _draw_tokens(
        self, scores: TokenScores, limits: Tensor, inputs: DecoderInputs
    ) -> ChosenTokens:
        assert self._seeds is not None
        assert isinstance(self.layout, UnifiedSwitches)
        # Other numbers than those that the switches are drawn by.
        noise = [torch.Generator().manual_seed(int(seed) ^ 1) for seed in self._seeds]
        drawn = draw_tokens(self.layout, scores, limits, inputs, self.estimator, noise)
        self._allowance = drawn.allowance
        return drawn.chosen

    def summary(self, tally: Tensor) -> dict[str, float]:
        """Numbers to log of a tally: mean utilisation of the plans, and how many exceed a limit."""
        plans, used, violations = tally.tolist()
        return {"utilisation": used / max(plans, 1), "violations": violations}


def last_answer(labels: Tensor) -> Tensor:
    """Where the last answer begins, shape (batch,), for labels (batch, tokens)."""
    answered = labels != IGNORE
    starts = answered.clone()
    starts[:, 1:] &= ~answered[:, :-1]
    places = torch.arange(labels.shape[1], device=labels.device)
    return (starts * places).amax(1).clamp(min=1)


@dataclass(frozen=True)
class BudgetCollator:
    """Batches of conversations, each with a limit and a seed that follow from the visit's number.

    So both are drawn anew in every epoch and for records that share an id, as in the authors' code,
    and do not depend on how records are split over processes.
    """

    packer: Packer  # makes dialogues
    most: int  # the largest limit; limits are uniform from the smallest to it
    seed: int  # of the draws
    # How many turns conversations may have; every batch draws one of these numbers.
    turns: Sequence[int]
    least: int = 0  # the smallest limit

    def __call__(self, visits: Sequence[Visit]) -> dict[str, Any]:
        """One training batch, with `ids` for error messages."""
        draws = [random.Random(f"{self.seed}-{visit.number}") for visit in visits]
        turns = random.Random(f"{self.seed}-turns-{visits[0].number}").choice(self.turns)
        conversations = [visit.conversation for visit in visits]
        return {
            **self.packer([replace(c, turns=c.turns[:turns]) for c in conversations]),
            "limits": torch.tensor([draw.randint(self.least, self.most) for draw in draws]),
            "seeds": torch.tensor([draw.getrandbits(62) for draw in draws]),
            "ids": [c.id for c in conversations],
        }


# Makes what is trained of a model, its Graph and a scheduler, by a configuration.
Learner = Callable[[Any, nn.Module, Graph, Scheduler, Workload | None], AdaptiveModel]


def by_estimator(
    config: AdaLlavaConfig,
    model: nn.Module,
    graph: Graph,
    scheduler: Scheduler,
    load: Workload | None,
) -> AdaptiveModel:
    """The learner of the paper: an estimator's gradient."""
    return AdaptiveModel(model, graph, scheduler, parse(config.estimator), load)


def train(config: AdaLlavaConfig, learner: Learner = by_estimator) -> AdaptiveModel:
    """Train, or go on from the last checkpoint; export where `export_dir` is set."""
    with begun(config):
        trainer, adaptive, processor = build_trainer(config, learner)
        trainer.run()
    gathered = trainer.whole_state()
    adaptive.scheduled.detach()
    if config.export_dir is not None and trainer.args.should_save:
        if gathered is not None:
            # What was trained holds shards.
            adaptive, _ = _build(config, learner)
            adaptive.load_state_dict(gathered)
            adaptive.scheduled.detach()
        export(adaptive, processor, config)
    return adaptive


def build_trainer(
    config: AdaLlavaConfig, learner: Learner = by_estimator
) -> tuple[RunTrainer, AdaptiveModel, Any]:
    """(trainer ready to start or resume, what it trains, processor); labels are learned here."""
    set_seed(config.seed)
    adaptive, processor = _build(config, learner, config.labels)
    packer = Packer(processor, config.max_text_tokens, dialogue_share=1.0)
    least, most = _limits(adaptive.layout, config)
    collate = BudgetCollator(packer, most, config.seed, config.turns, least)
    arguments, records = arguments_of(config), conversations_of(config)
    step = arguments.train_batch_size * arguments.world_size * config.gradient_accumulation_steps
    kinds = records.kinds if isinstance(records, LlavaConversations) else None
    trainer = adaptive.trainer(
        model=adaptive,
        args=arguments,
        train_dataset=Visited(records),
        sampler=Visits(kinds, len(records), step, config.max_steps, config.seed),
        data_collator=collate,
        processing_class=processor,
        rates={"scheduler.": config.scheduler_learning_rate or config.learning_rate},
    )
    return trainer, adaptive, processor


def _limits(layout: Layout, config: AdaLlavaConfig) -> tuple[int, int]:
    """The smallest and the largest limit that samples get."""
    least = layout.limit(Budget.of(config.least_budget)) if config.least_budget else 0
    # With everything on, a scheduler's own cost comes on top of the base model's.
    most = layout.limit(Budget.of(config.most_budget)) if config.most_budget < 1 else layout.steps
    return least, most


def _build(
    config: AdaLlavaConfig, learner: Learner, labels: Path | None = None
) -> tuple[AdaptiveModel, Any]:
    """(model and scheduler, processor)."""
    model, processor, name = load_base(config)
    graph = lower_model(model, name)
    if config.freeze_model:
        model.requires_grad_(False)
    scheduler = Scheduler.of(graph, config.switches)
    if labels is not None:
        scheduled = Scheduled(
            model, graph, scheduler, mask=True, decide=stop, decide_tokens=keep_all_tokens
        )
        _learn(read_labels(labels), scheduled, processor, config)
    load = None
    if config.text_tokens is not None:
        load = Workload.default(graph, text_tokens=config.text_tokens, new_tokens=0)
    return learner(config, model, graph, scheduler, load), processor


def _learn(labels: Labels, scheduled: Scheduled, processor: Any, config: AdaLlavaConfig) -> None:
    """A warm start, with checkpoints of its own; every process holds the whole model."""
    alone = {
        "output_dir": str(Path(config.output_dir) / "labels"),
        "max_steps": config.label_steps,
        "learning_rate": config.label_learning_rate,
        "weight_decay": 0.01,
        "gradient_accumulation_steps": 1,
        "activation_checkpointing": False,
        "fsdp": "",
        "deepspeed": None,
    }
    arguments = arguments_of(config.model_copy(update=alone))
    cast(Any, scheduled.model).to(arguments.device)
    pictures = config.label_images, config.label_prompts
    asked = Asked(scheduled.model, processor, dict.fromkeys(labels.samples), *pictures)
    warm_start(scheduled, labels, asked, arguments, config.label_encoder_learning_rate)


def export(adaptive: AdaptiveModel, processor: Any, config: AdaLlavaConfig) -> None:
    """Write the checkpoint, the processor, the scheduler and the configuration as one folder."""
    adaptive.scheduler.provenance = {"recipe": facts_of(config)}
    beside = partial(save_scheduler, adaptive.scheduler)
    export_model(adaptive.model, processor, config, beside)
