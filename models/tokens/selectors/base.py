"""What a token selector is, what it is given and what it returns.

A selector works in one of two places. A *vision* selector sees each run of the vision encoder (one
image, or one tile of a high-resolution image) before the projector, and returns fewer, possibly
merged, features. A *decoder* selector acts just before decoder layer k and says which tokens of
each sample go on; it scores them with the attention of layer k - 1. Selectors never touch a model:
they are handed tensors and return tensors, and an executor does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, Flag, auto
from typing import ClassVar, Self, TypeVar

from torch import Tensor

from planner.ir.errors import InputError
from planner.models.tokens.selectors.arguments import Arguments
from planner.models.tokens.selectors.ranking import pack

__all__ = [
    "DecoderInputs",
    "DecoderSelection",
    "DecoderSelector",
    "Needs",
    "Product",
    "Selector",
    "Sizes",
    "Stage",
    "TowerAttention",
    "VisionInputs",
    "VisionSelection",
    "VisionSelector",
    "check_cap",
    "supplied",
]

T = TypeVar("T")

# Rows, columns and inner size of a product of two matrices: 2 * rows * columns * inner FLOPs.
Product = tuple[int, int, int]


class Stage(Enum):
    """Where a selector works."""

    VISION = "vision"
    DECODER = "decoder"


class Needs(Flag):
    """What an executor must supply besides features (vision) or image and valid (decoder).

    A field that no flag asks for may stay empty.
    """

    NOTHING = 0
    TOWER_ATTENTION = auto()  # VisionInputs.tower, for the layers in `VisionSelector.tower_layers`
    CLS_FEATURE = auto()  # VisionInputs.cls_feature
    TEXT_EMBEDDING = auto()  # VisionInputs.patch_embeddings and .text_embeddings
    QUERY_KEY = auto()  # DecoderInputs.query, .key, .scaling and .attention_mask of layer k - 1
    MARKS = auto()  # DecoderInputs.marks, from `DecoderSelector.mark`
    HIDDEN_STATES = auto()  # DecoderInputs.hidden_states


@dataclass(frozen=True)
class TowerAttention:
    """Queries and keys of one attention layer of a vision tower with a CLS token.

    Attributes:
        query: shape (runs, width), the output of ``q_proj`` at the CLS token.
        key: shape (runs, 1 + patches, width), the output of ``k_proj``, CLS token first.
        heads: attention heads of the layer; width is heads * head_dim.
    """

    query: Tensor
    key: Tensor
    heads: int


@dataclass(frozen=True)
class VisionInputs:
    """What a vision selector sees: all runs of the vision encoder in a batch.

    Attributes:
        features: shape (runs, patches, width): what the tower hands to the projector.
        cls_feature: shape (runs, width): the CLS token at the same layer of the tower.
        tower: attention by layer of the tower, under the indices of `VisionSelector.tower_layers`.
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
        marks: shape (batch, seq), bool: what `DecoderSelector.mark` returned before layer 0, at
            the tokens that are left.
        hidden_states: shape (batch, seq, width): what is about to enter layer k.
    """

    image: Tensor
    valid: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    scaling: float | None = None
    attention_mask: Tensor | None = None
    marks: Tensor | None = None
    hidden_states: Tensor | None = None


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

    def indices(self, image: Tensor) -> tuple[Tensor, ...]:
        """Per sample, the sequence positions of kept image tokens, ascending."""
        return tuple(row.nonzero().flatten() for row in self.keep & image)

    def packed(self, valid: Tensor, side: str = "left") -> tuple[Tensor, Tensor]:
        """Gather indices that really drop tokens, and padding no sample needs any more.

        Args:
            valid: shape (batch, seq), bool: False for padding.
            side: ``left`` or ``right``: where samples that keep fewer tokens are padded.

        Returns:
            index: shape (batch, longest), int64: where each remaining token comes from; samples
                keep their order.
            valid: shape (batch, longest), bool.
        """
        return pack(self.keep & valid, side)


def supplied(value: T | None, what: str) -> T:
    """The value, or ValueError where an executor left out what a selector needs."""
    if value is None:
        raise ValueError(f"the executor did not supply {what}, which the selector needs")
    return value


@dataclass(frozen=True)
class Sizes:
    """What the products follow from that a selector makes of its own.

    Attributes:
        image_tokens: that enter: of one run (vision) or of one sample (decoder).
        text_tokens: of one sample.
        query: features of the queries that tokens are scored by, heads * head_dim.
        hidden: width of the hidden states.
        tower: width of the vision tower.
        tower_heads: attention heads of the vision tower.
    """

    image_tokens: int
    text_tokens: int = 0
    query: int = 0
    hidden: int = 0
    tower: int = 0
    tower_heads: int = 1


class Selector(Arguments, ABC):
    """A rule that picks image tokens; a frozen dataclass whose fields are its arguments.

    Attributes:
        name: how users call it.
        stage: where it works.
        needs: what it must be given.
    """

    stage: ClassVar[Stage]
    needs: ClassVar[Needs] = Needs.NOTHING

    @property
    def is_adaptive(self) -> bool:
        """Whether the content decides how many tokens are left."""
        return False

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that are the first to see a smaller set, ascending; (0,) for vision."""

    @abstractmethod
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """How many image tokens are left from each of `layers` on.

        Args:
            tokens: image tokens before selection: of one run (vision) or one sample (decoder).

        Returns:
            One count per layer: exact, or for an adaptive selector with a cap the most that it
            leaves. None where it depends on the content, and may be all of them.
        """

    def counts_of_sample(self, image_tokens: int, per_run: int = 0) -> tuple[int | None, ...]:
        """The same for one sample, as `counts` says it for what the selector looks at.

        Args:
            image_tokens: of the sample.
            per_run: image tokens that one run of the vision encoder yields; 0 where unknown.
        """
        return self.counts(image_tokens)

    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """Products of matrices that choosing takes, of one run (vision) or sample, at most.

        The one row of attention that FastV scores by is not among them: the operator
        ``select_tokens`` has it.

        Args:
            layer: one of `layers`.
            sizes: of what is chosen from.
        """
        return ()


def check_cap(selector: Selector, cap: float | None, ratio: float | None = None) -> None:
    """Raise InputError unless an adaptive selector's cap, its field `max`, is a share.

    `ratio`: of a selector that can also keep a fixed number; then it has no cap.
    """
    good = cap is None or 0 < cap < 1
    selector.check("max", good, "a share above 0 and below 1")
    if None not in (cap, ratio):
        raise InputError(
            f"{selector.name} keeps a fixed number with ratio, and at most a share with max: give "
            f"one of the two."
        )


class VisionSelector(Selector):
    """A selector that works between the vision tower and the projector.

    Attributes:
        tower_layers: layers of the tower whose attention it needs.
    """

    stage = Stage.VISION
    tower_layers: ClassVar[tuple[int, ...]] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """The whole decoder sees the smaller set."""
        return (0,)

    def counts_of_sample(self, image_tokens: int, per_run: int = 0) -> tuple[int | None, ...]:
        """Run by run; tokens that no run yields, such as the ends of lines between tiles, stay."""
        if not per_run:
            return self.counts(image_tokens)
        runs, others = -(-image_tokens // per_run), image_tokens % per_run
        return tuple(
            None if count is None else min(image_tokens, runs * count + others)
            for count in self.counts(per_run)
        )

    @abstractmethod
    def select(self, inputs: VisionInputs) -> VisionSelection:
        """Reduce every run of the batch."""


class DecoderSelector(Selector):
    """A selector that works inside the decoder."""

    stage = Stage.DECODER

    @classmethod
    @abstractmethod
    def at(cls, layer: int, keep: int, of: int) -> Self:
        """The selector of this kind that keeps `keep` of `of` tokens from `layer` on."""

    def mark(self, hidden_states: Tensor, image: Tensor, valid: Tensor) -> Tensor:
        """Mark tokens before layer 0, for selectors with `Needs.MARKS`.

        Args:
            hidden_states: shape (batch, seq, width): what is about to enter layer 0.
            image: shape (batch, seq), bool.
            valid: shape (batch, seq), bool.

        Returns:
            Shape (batch, seq), bool; the executor keeps it in step with the tokens.
        """
        raise NotImplementedError(f"{self.name} needs no marks")

    @abstractmethod
    def select(self, inputs: DecoderInputs, layer: int) -> DecoderSelection:
        """Choose what goes on to `layer`, one of `layers`."""
