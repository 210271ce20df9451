"""What a rule is given and what it returns, and the functions that run the rule of a selector.

Rules never touch a model. Each is registered for the type of its selector, see
`planner.planning.selectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import TypeVar

import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.models.tokens.selectors.scoring import PLAIN, ScoreRule, attention_rows, visible_keys
from planner.planning.selectors import DecoderSelector, Selector, TowerSelector, VisionSelector
from planner.planning.selectors.selector import without_cls_token

T = TypeVar("T")


@singledispatch
def select_features(selector: VisionSelector, inputs: VisionInputs) -> VisionSelection:
    """Reduce every run of the batch by a vision selector's rule."""
    raise _without_rule(selector)


@singledispatch
def select_patches(selector: TowerSelector, layers: Sequence[LayerAttention], keep: int) -> Tensor:
    """Choose `keep` patches of every run inside the vision tower, by a tower selector's rule.

    `layers`: those of a `PatchStage` that patches are scored by, the first one first; their first
    token is the CLS token. Returns which patches of those that are there stay, ascending, shape
    (runs, keep), int64.
    """
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
class LayerAttention:
    """What one attention layer computed with."""

    query: Tensor  # (batch, heads, seq, head_dim), rotated
    key: Tensor  # (batch, kv_heads, keys, head_dim), rotated
    valid: Tensor  # (batch, keys), bool: False for padding
    # (batch or 1, 1, seq, keys), bool (True: visible) or additive; None is causal.
    mask: Tensor | None = None
    rule: ScoreRule = PLAIN

    def weights(self) -> Tensor:
        """Attention of every token to every key, the mean over heads: (batch, seq, keys)."""
        batch, _, seq, _ = self.query.shape
        rows = torch.arange(seq, device=self.query.device).expand(batch, -1)
        visible = visible_keys(rows, self.valid, self.mask, seq)
        return attention_rows(self.query, self.key, visible, self.rule).mean(1)


@dataclass(frozen=True)
class TowerAttention:
    """Queries and keys of one attention layer of a vision tower, with a CLS token or without."""

    # (runs, width), the output of ``q_proj`` at the CLS token; (runs, patches, width) without one
    query: Tensor
    key: Tensor  # (runs, tokens, width), the output of ``k_proj``, the CLS token first
    heads: int  # of the layer; width is heads * head_dim

    @property
    def has_cls(self) -> bool:
        """Whether there is a CLS token."""
        return self.query.ndim == 2

    @property
    def patch_keys(self) -> Tensor:
        """Keys of the patches, (runs, patches, width)."""
        return self.key[:, 1:] if self.has_cls else self.key

    def received(self, heads: int | None = None) -> Tensor:
        """Attention of the CLS token to every patch, CLS itself left out after the softmax.

        Without a CLS token the mean of what a patch receives from all patches, as the authors of
        VisionZip (arXiv 2412.04467) and VisPruner do. Of one wide head the scale is 1/sqrt(width),
        as in LLaVA-PruMerge. Shape (runs, heads, patches), float32 or wider.
        """
        runs, width, heads = len(self.query), self.query.shape[-1], heads or self.heads
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query, key = (
            part.to(dtype).view(runs, -1, heads, width // heads).transpose(1, 2)
            for part in (self.query, self.key)
        )
        logits: Tensor = query @ key.mT * (width // heads) ** -0.5
        weights = logits.softmax(-1).mean(2)
        return weights[..., 1:] if self.has_cls else weights


@dataclass(frozen=True)
class VisionInputs:
    """What a vision selector sees: all runs of the vision encoder in a batch."""

    features: Tensor  # (runs, patches, width): what the tower hands to the projector
    cls_feature: Tensor | None = None  # (runs, width): the CLS token at the same layer of the tower
    # By `VisionSelector.tower_layers`.
    tower: Mapping[int, TowerAttention] = field(default_factory=dict)
    # (runs, patches, d): the features in CLIP's joint image-text space
    # (``visual_projection(post_layernorm(features))``).
    patch_embeddings: Tensor | None = None
    # (runs, d): the question to each run, in the same space, as `TextTower.read` makes it.
    text_embeddings: Tensor | None = None
    projected: Tensor | None = None  # (runs, patches, out): all features behind the projector
    # For each image in order (rows, columns) of its tiles. An image takes 1 + rows * columns
    # consecutive runs, the overview first, then tiles in raster order. None: one run an image.
    tiles: tuple[tuple[int, int], ...] | None = None

    def attention(self, layer: int, selector: str) -> TowerAttention:
        """The tower's attention at a layer; InputError where the tower has no CLS token."""
        if layer not in self.tower:
            raise without_cls_token(selector)
        return self.tower[layer]


def embeddings(selector: VisionSelector, inputs: VisionInputs) -> tuple[Tensor, Tensor]:
    """Patches and questions in CLIP's joint space; InputError where there is no text tower."""
    if inputs.patch_embeddings is None or inputs.text_embeddings is None:
        raise InputError(
            f"{selector.name} compares patches with the prompt in CLIP's joint space, but this"
            f" model has no CLIP text encoder; name the folder of one, as in"
            f" {selector.name}:clip=FOLDER, or take another selector, such as visionzip."
        )
    return inputs.patch_embeddings, inputs.text_embeddings


@dataclass(frozen=True)
class VisionSelection:
    """What is left of each run."""

    features: tuple[Tensor, ...]  # (left, width) each, in the order the language model gets them
    # (left,) each, int64: the patch that a feature stands at; -1 for one that is no patch (the CLS
    # token, a summary of dropped patches).
    indices: tuple[Tensor, ...]


@dataclass(frozen=True)
class DecoderInputs:
    """What a decoder selector sees before layer k, during prefill.

    ``seq`` counts the tokens being processed, ``keys`` those attended to: the same, or more where
    a cache holds earlier turns.
    """

    image: Tensor  # (batch, seq), bool: which tokens are image tokens, at any position
    valid: Tensor  # (batch, keys), bool: False for padding
    query: Tensor | None = None  # (batch, heads, seq, head_dim), rotated, of layer k - 1
    key: Tensor | None = None  # (batch, kv_heads, keys, head_dim), rotated, of layer k - 1
    rule: ScoreRule = PLAIN  # of layer k - 1
    # Of layer k - 1: (batch or 1, 1, seq, keys), bool (True: visible) or additive; None is causal.
    attention_mask: Tensor | None = None
    # The same of all layers that it is scored by, `Selector.scored_layers`; k - 1 is the last.
    scored: tuple[LayerAttention, ...] = ()
    marks: Tensor | None = None  # (batch, seq), bool: of `mark_tokens`, at the tokens left
    # (batch, seq), bool: the prompt's own tokens, where others follow them that an assistant has
    # drafted; None: all that are valid.
    prompt: Tensor | None = None
    hidden_states: Tensor | None = None  # (batch, seq, width): what is about to enter layer k
    # (batch, seq, width): the same through the decoder's final norm
    normed_states: Tensor | None = None
    # (batch,), int64: image tokens of each sample before any decoder selector dropped some
    image_tokens: Tensor | None = None
    # Logits (batch, n, 2), "keep" first, of image tokens' hidden states (batch, n, width), of which
    # (batch, n), bool, are no padding.
    image_predictor: Callable[[Tensor, Tensor], Tensor] | None = None
    # (batch, seq), bool: what a scheduler has chosen to keep; None where none decides
    chosen: Tensor | None = None
    triton: bool = False  # whether Triton scores and ranks tokens, where a kernel can


@dataclass(frozen=True)
class DecoderSelection:
    """Which tokens of each sample go on."""

    keep: Tensor  # (batch, seq), bool; True for all text and padding
    # (batch, seq, width) where the selector changed kept tokens (it merged dropped ones into them),
    # else None. Rows of dropped tokens mean nothing.
    hidden_states: Tensor | None = None


def supplied(value: T | None, what: str) -> T:
    """The value, or ValueError where an executor left out what a selector needs."""
    if value is None:
        raise ValueError(f"the executor did not supply {what}, which the selector needs")
    return value
