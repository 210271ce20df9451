"""What a rule is given and what it returns, and the functions that run the rule of a selector.

Rules never touch a model. Each is registered for the type of its selector, see
`planner.planning.selectors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import TypeVar

import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.planning.selectors import DecoderSelector, Selector, VisionSelector

T = TypeVar("T")


@singledispatch
def select_features(selector: VisionSelector, inputs: VisionInputs) -> VisionSelection:
    """Reduce every run of the batch by a vision selector's rule."""
    raise _without_rule(selector)


@singledispatch
def select_tokens(selector: DecoderSelector, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """Choose what goes on to `layer`, one of ``selector.layers``, by a decoder selector's rule."""
    raise _without_rule(selector)


@singledispatch
def mark_tokens(
    selector: DecoderSelector, hidden_states: Tensor, image: Tensor, valid: Tensor
) -> Tensor:
    """Mark tokens by what is about to enter layer 0, for selectors with `Needs.MARKS`.

    `hidden_states` has shape (batch, seq, width), the others and the result (batch, seq), bool. The
    executor keeps the marks in step with the tokens.
    """
    raise _without_rule(selector)


def _without_rule(selector: Selector) -> TypeError:
    return TypeError(f"no rule is registered for {type(selector).__name__}")


@dataclass(frozen=True)
class TowerAttention:
    """Queries and keys of one attention layer of a vision tower with a CLS token.

    Attributes:
        query: shape (runs, width), the output of ``q_proj`` at the CLS token.
        key: shape (runs, 1 + patches, width), the output of ``k_proj``, CLS token first.
        heads: of the layer; width is heads * head_dim.
    """

    query: Tensor
    key: Tensor
    heads: int

    def of_cls(self, heads: int | None = None) -> Tensor:
        """Attention of the CLS token to every patch, CLS itself left out after the softmax.

        Of one wide head the scale is 1/sqrt(width), as in LLaVA-PruMerge. Shape (runs, heads,
        patches), float32 or wider; rows sum to less than one.
        """
        (runs, width), heads = self.query.shape, heads or self.heads
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query = self.query.to(dtype).view(runs, heads, 1, width // heads)
        key = self.key.to(dtype).view(runs, -1, heads, width // heads).transpose(1, 2)
        logits: Tensor = query @ key.mT * (width // heads) ** -0.5
        return logits.softmax(-1)[:, :, 0, 1:]


@dataclass(frozen=True)
class VisionInputs:
    """What a vision selector sees: all runs of the vision encoder in a batch.

    Attributes:
        features: shape (runs, patches, width): what the tower hands to the projector.
        cls_feature: shape (runs, width): the CLS token at the same layer of the tower.
        tower: attention by `VisionSelector.tower_layers`.
        patch_embeddings: shape (runs, patches, d): the features in CLIP's joint image-text space
            (``visual_projection(post_layernorm(features))``).
        text_embeddings: shape (runs, d): the prompt that goes with each run, in the same space
            (``text_embeds``), not normalised.
        tiles: for each image in order (rows, columns) of its tiles. An image takes
            1 + rows * columns consecutive runs, the overview first, then tiles in raster order.
            None: every run is an image of its own.
    """

    features: Tensor
    cls_feature: Tensor | None = None
    tower: Mapping[int, TowerAttention] = field(default_factory=dict)
    patch_embeddings: Tensor | None = None
    text_embeddings: Tensor | None = None
    tiles: tuple[tuple[int, int], ...] | None = None

    def attention(self, layer: int, selector: str) -> TowerAttention:
        """The tower's attention at a layer; InputError where the tower has no CLS token."""
        if layer not in self.tower:
            raise InputError(
                f"{selector} ranks patches by the attention of a CLS token, which this vision tower"
                " does not have; take a selector that works in the decoder, such as fastv."
            )
        return self.tower[layer]


@dataclass(frozen=True)
class VisionSelection:
    """What is left of each run.

    Attributes:
        features: per run, shape (left, width), in the order the language model gets them.
        indices: per run, shape (left,), int64: the patch that each feature stands at; -1 for one
            that is no patch (the CLS token, a summary of dropped patches).
    """

    features: tuple[Tensor, ...]
    indices: tuple[Tensor, ...]


@dataclass(frozen=True)
class DecoderInputs:
    """What a decoder selector sees before layer k, during prefill.

    ``seq`` counts the tokens being processed, ``keys`` those attended to: the same, or more where
    a cache holds earlier turns.

    Attributes:
        image: shape (batch, seq), bool: which tokens are image tokens, at any position.
        valid: shape (batch, keys), bool: False for padding.
        query: shape (batch, heads, seq, head_dim), rotated, of layer k - 1.
        key: shape (batch, kv_heads, keys, head_dim), rotated, of layer k - 1.
        scaling: what layer k - 1 multiplies q k^T with; None is 1/sqrt(head_dim).
        attention_mask: the mask of layer k - 1, shape (batch or 1, 1, seq, keys), bool (True is
            visible) or additive; None is causal.
        marks: shape (batch, seq), bool: of `mark_tokens`, at the tokens that are left.
        hidden_states: shape (batch, seq, width): what is about to enter layer k.
        triton: whether Triton scores and ranks tokens, where a kernel can.
    """

    image: Tensor
    valid: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    scaling: float | None = None
    attention_mask: Tensor | None = None
    marks: Tensor | None = None
    hidden_states: Tensor | None = None
    triton: bool = False


@dataclass(frozen=True)
class DecoderSelection:
    """Which tokens of each sample go on.

    Attributes:
        keep: shape (batch, seq), bool. True for all text and padding.
        hidden_states: shape (batch, seq, width) where the selector changed kept tokens (it merged
            dropped ones into them), else None. Rows of dropped tokens mean nothing.
    """

    keep: Tensor
    hidden_states: Tensor | None = None


def supplied(value: T | None, what: str) -> T:
    """The value, or ValueError where an executor left out what a selector needs."""
    if value is None:
        raise ValueError(f"the executor did not supply {what}, which the selector needs")
    return value
