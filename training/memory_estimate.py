"""What a training step takes of a card's memory, from a configuration and a model's config alone.

    planner train training/configs/unified-llava-7b.yaml --estimate 8

Weights, gradients and AdamW's moments are in float32, to which accelerate raises them in mixed
precision; with `fsdp` processes share them, and whole layers are gathered in 16 bits, two at a
time. Activations are those of one micro-batch of the longest prompts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import AutoModelForImageTextToText

from planner.ir.errors import InputError
from planner.ir.lowering.capture import build_on_meta
from planner.planning.catalog import ALIASES, find_model
from planner.planning.graph_cache import lowered_graph
from planner.training.adallava import AdaLlavaConfig

_FLOAT = 4
# Of masked attention, for each score: itself and its exponential, as weights and divided, and the
# gradient of one of them.
_SCORE_BYTES = 2 + 4 + 4 + 2 + 4


@dataclass(frozen=True)
class StepBytes:
    """Bytes on each card."""

    weights: int
    gradients: int
    moments: int
    gathered: int  # whole layers, while they run
    kept_activations: int  # from the forward pass for the backward pass
    running_layer: int  # inside the layer that runs, its attention scores among them
    logits: int  # and their gradient, in float32

    @property
    def total(self) -> int:
        """The sum."""
        return sum(asdict(self).values())


def step_bytes(config: AdaLlavaConfig, cards: int) -> StepBytes:
    """What a step of a configuration takes on each of some cards.

    Raises InputError: the model cannot be had, or there are no cards.
    """
    if cards < 1:
        raise InputError("a step is estimated for one card or more")
    known = {alias.hub_id: name for name, alias in ALIASES.items()}
    found = find_model(known.get(config.model, config.model))
    image_tokens = int(lowered_graph(found)[0].properties["image_tokens"])
    stock = found.load_config()
    model: Any = build_on_meta(stock, AutoModelForImageTextToText.from_config)
    tower = model.get_encoder("image") if config.freeze_vision else None
    frozen = 0 if tower is None else sum(weight.numel() for weight in tower.parameters())
    every = sum(weight.numel() for weight in model.parameters())
    trained = 0 if config.freeze_model else every - frozen
    text = stock.get_text_config()
    shared = cards if config.fsdp else 1
    short = 2 if config.dtype != "float32" else _FLOAT
    tokens = image_tokens + config.max_text_tokens + 1
    rows = config.batch_size * tokens
    inside = rows * short * (8 * text.hidden_size + 4 * text.intermediate_size)
    inside += config.batch_size * text.num_attention_heads * tokens**2 * _SCORE_BYTES
    layers = text.num_hidden_layers
    kept = layers * rows * text.hidden_size * short
    if not config.activation_checkpointing:
        kept += (layers - 1) * inside
    embedding = model.get_input_embeddings().weight.numel()
    of_layer = (every - frozen - 2 * embedding) // layers
    return StepBytes(
        weights=_FLOAT * every // shared,
        gradients=_FLOAT * trained // shared,
        moments=2 * _FLOAT * trained // shared,
        gathered=short * (2 * of_layer + 2 * embedding) if config.fsdp else 0,
        kept_activations=kept,
        running_layer=inside,
        logits=2 * _FLOAT * rows * text.vocab_size,
    )
