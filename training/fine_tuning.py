"""A LLaVA changed to have fewer image tokens, and trained to do with them, by plain cross-entropy.

    planner train training/configs/voco.yaml [--set voco_tokens=4 ...]

What is changed is one of: VoCo tokens, which sum up the image (VoCo-LLaMA, arXiv 2406.12275); the
projector, as in `planner.models.projectors`; or a selector, which drops tokens in training as it
will afterwards (PruMerge+, VisionZip and IVTP were published with models trained so).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import model_validator

from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.ir.structure import tiles
from planner.models.projectors import fitted_processor, with_projector
from planner.models.running.skipping import obeying
from planner.models.tokens.summed_up import TOKEN_ID, SummedUp, add_voco_tokens
from planner.plan import Plan
from planner.planning.selectors import stages_of
from planner.training.config import CountOrNone
from planner.training.conversation_runs import (
    ConversationConfig,
    arguments_of,
    conversations_of,
    export_model,
    load_base,
)
from planner.training.data import Conversation, Packer
from planner.training.run_folders import begun
from planner.training.trainer import RunTrainer


class FineTuningConfig(ConversationConfig):
    """Everything that makes one fine-tuned model."""

    recipe: str = "fine-tuning"
    voco_tokens: CountOrNone = 0  # that sum up the image; 0 for none
    projector: str = ""  # such as ``token-packer:2``; "" keeps the model's own
    tokens: str = ""  # a selector, such as ``prumerge+:ratio=0.125``

    @model_validator(mode="after")
    def _changes_one_thing(self) -> Self:
        if sum(map(bool, (self.voco_tokens, self.projector, self.tokens))) != 1:
            raise InputError("fine-tuning takes one of voco_tokens, projector and tokens")
        return self


@dataclass(frozen=True)
class _Collator:
    """Batches of conversations, in which VoCo tokens, if there are any, hide the image."""

    packer: Packer
    voco: int | None  # the VoCo token

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Any]:
        """One training batch, with `ids` for error messages."""
        batch = self.packer(conversations)
        if self.voco is not None:
            places = torch.arange(batch["input_ids"].shape[1])[None]
            summed_up = SummedUp.of(batch["input_ids"] == self.voco)
            batch["attention_mask"] = batch["attention_mask"] & summed_up.visible(places, places)
        return {**batch, "ids": [c.id for c in conversations]}


def train(config: FineTuningConfig) -> Any:
    """Train, or go on from the last checkpoint; export where `export_dir` is set."""
    with begun(config), ExitStack() as stack:
        trainer, model, processor = build_trainer(config, stack)
        trainer.run()
    gathered = trainer.whole_state()
    if config.export_dir is not None and trainer.args.should_save:
        if gathered is not None:
            # What was trained holds shards.
            model, processor, _ = _build(config)
            model.load_state_dict(gathered)
        export_model(model, processor, config)
    return model


def build_trainer(config: FineTuningConfig, stack: ExitStack) -> tuple[RunTrainer, Any, Any]:
    """(trainer ready to start or resume, what it trains, processor).

    The model obeys its selector until the stack is closed.
    """
    model, processor, name = _build(config)
    if config.tokens:
        graph = lower_model(model, name)
        tokens = int(graph.properties["image_tokens"])
        stages = stages_of(config.tokens, tokens, tokens, tiles(graph))
        fingerprint = str(graph.properties["fingerprint"])
        plan = Plan(graph.name, fingerprint, graph.layers, tokens=stages)
        stack.enter_context(obeying(model, graph, plan))
    packer = Packer(processor, config.max_text_tokens, dialogue_share=1.0)
    trainer = RunTrainer(
        model=model,
        args=arguments_of(config),
        train_dataset=conversations_of(config, images_only=True),
        data_collator=_Collator(packer, getattr(model.config, TOKEN_ID, None)),
        processing_class=processor,
    )
    return trainer, model, processor


def _build(config: FineTuningConfig) -> tuple[Any, Any, str]:
    """(model to train, processor, what it is called)."""
    model, processor, name = load_base(config)
    # Of what is drawn anew.
    torch.manual_seed(config.seed)
    if config.voco_tokens:
        add_voco_tokens(model, processor, config.voco_tokens)
    if config.projector:
        model = with_projector(model, config.projector)
        processor = fitted_processor(processor, model.config)
    return model, processor, name
