"""What runs on conversations have in common, whatever is trained beside the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import TrainingArguments

from planner.ir.errors import InputError
from planner.loading import load_model
from planner.models.conversion import as_llava_v1
from planner.training.config import Count, Rate, RunConfig, Seed, Share
from planner.training.data import Conversation, LlavaConversations, Packer, SceneConversations
from planner.training.run_folders import exporting
from planner.training.tiny_llava import export as export_half
from planner.training.trainer import training_arguments


class ConversationConfig(RunConfig):
    """A run that begins with a model and its conversations; a batch counts conversations."""

    # Write the weights in half precision; the config still asks for float32.
    export_half: bool = False

    model: str = "tiny-llava"
    # ``llava-v1`` for LLaVA-1.5's system prompt and pictures padded to a square, as the authors
    # train; ``own`` for the model's chat template and pictures as its processor has them.
    prompt: Literal["own", "llava-v1"] = "own"

    # LLaVA's conversation JSON and its images; rendered scenes where there is none.
    conversations: str | None = None
    image_folder: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    data_seed: Seed = 1
    # How many turns conversations have: every batch draws one of these numbers.
    turns: Annotated[list[Count], Field(min_length=1)] = [1]
    description_share: Share = 0.1

    max_steps: Count = 1000
    gradient_accumulation_steps: Count = 1
    learning_rate: Rate = 5e-4
    warmup_ratio: Share = 0.03
    lr_schedule: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
        "constant_with_warmup", "inverse_sqrt",
    ] = "cosine"  # fmt: skip
    freeze_vision: bool = True
    dtype: str = "float32"
    activation_checkpointing: bool = False
    fsdp: str = ""
    fsdp_layer: str | None = None
    deepspeed: str | None = None

    @model_validator(mode="after")
    def _has_pictures(self) -> Self:
        if self.conversations is not None and self.image_folder is None:
            raise InputError("conversations need their image_folder")
        return self


def load_base(config: ConversationConfig) -> tuple[Any, Any, str]:
    """(model to train, processor, what the model is called)."""
    model, processor, _ = load_model(config.model, config.dtype)
    if config.prompt == "llava-v1":
        processor = as_llava_v1(processor)
    # As in LLaVA's second stage, where the projector is trained.
    if config.freeze_vision and (tower := model.get_encoder("image")) is not None:
        tower.requires_grad_(False)
    return model, processor, config.model.rstrip("/").rpartition("/")[2]


def conversations_of(
    config: ConversationConfig, images_only: bool = False
) -> Sequence[Conversation]:
    """What a run is trained on; `images_only` leaves out conversations without a picture."""
    if config.conversations is not None:
        assert config.image_folder is not None
        return LlavaConversations(
            config.conversations, config.image_folder, config.on_error, images_only
        )
    return SceneConversations(
        "train",
        config.scenes,
        config.data_seed + 10 * config.seed,
        max(config.turns),
        max(0, max(config.turns) - 1),
        config.description_share,
        config.family_weights,
    )


@dataclass(frozen=True)
class TurnsCollator:
    """Batches of conversations, cut to a number of turns that every batch draws."""

    packer: Packer
    seed: int  # of the draws
    turns: Sequence[int]

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Any]:
        """One training batch, with `ids` for error messages."""
        turns = random.Random(f"{self.seed}-turns-{conversations[0].id}").choice(self.turns)
        cut = [replace(c, turns=c.turns[:turns]) for c in conversations]
        return {**self.packer(cut), "ids": [c.id for c in conversations]}


def arguments_of(config: ConversationConfig) -> TrainingArguments:
    """transformers' arguments for a run."""
    if config.fsdp and not torch.accelerator.is_available():
        raise InputError(
            "fsdp shards over accelerators, and on CPUs every process would hold all of the model: "
            "leave fsdp empty here"
        )
    layers = {"transformer_layer_cls_to_wrap": config.fsdp_layer}
    return training_arguments(
        config,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        lr_scheduler_type=config.lr_schedule,
        warmup_steps=round(config.warmup_ratio * config.max_steps),
        bf16=config.dtype == "bfloat16",
        save_total_limit=2,
        fsdp=config.fsdp or None,
        fsdp_config=layers if config.fsdp else None,
        deepspeed=config.deepspeed or None,
        activation_checkpointing=config.activation_checkpointing or None,
    )


def export_model(
    model: Any,
    processor: Any,
    config: ConversationConfig,
    beside: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Write checkpoint, processor and what belongs `beside` them as the run's `export_dir`, whole.

    Raises InputError: it cannot be written, or has other files than an export.
    """
    assert config.export_dir is not None
    with exporting(Path(config.export_dir), config) as folder:
        if config.export_half:
            export_half(model, processor, folder)
        else:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        beside(folder)


def facts_of(config: ConversationConfig) -> dict[str, Any]:
    """A run's configuration as what it made remembers it."""
    return config.model_dump(mode="json", exclude={"output_dir", "export_dir"})
