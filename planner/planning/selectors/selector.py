"""What is known of a token selector without a model: its arguments, where it works, what it costs.

A selector works in one of two places. A *vision* selector sees each run of the vision encoder (one
image, or one tile of a high-resolution image) before the projector, and leaves fewer, possibly
merged, features; or it drops patches inside the tower. A *decoder* selector acts just before
decoder layer k and says which tokens of each sample go on; it may have a part in the tower as well.
What they compute is in `planner.models.tokens.selectors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import ClassVar, Self

from typing_extensions import override

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.vision_tower import Projector, VisionTower, ranking_attention
from planner.planning.selectors.arguments import Arguments

# Rows, columns and inner size of a product of two matrices: 2 * rows * columns * inner FLOPs.
Product = tuple[int, int, int]


class Needs(Flag):
    """What an executor must supply besides features (vision) or image and valid (decoder).

    The fields are those of `VisionInputs` and `DecoderInputs` in
    `planner.models.tokens.selectors`; one that no flag asks for may stay empty.
    """

    NOTHING = 0
    TOWER_ATTENTION = auto()  # VisionInputs.tower, for the layers in `VisionSelector.tower_layers`
    CLS_FEATURE = auto()  # VisionInputs.cls_feature
    TILES = auto()  # VisionInputs.tiles, where pictures are cut into tiles
    TEXT_EMBEDDING = auto()  # VisionInputs.patch_embeddings and .text_embeddings
    PROJECTED = auto()  # VisionInputs.projected: the rule works behind the projector
    QUERY_KEY = auto()  # DecoderInputs.query, .key, .scaling and .attention_mask of layer k - 1
    # The same of the next layer that attends, from k on.
    NEXT_QUERY_KEY = auto()
    IMAGE_TOKENS = auto()  # DecoderInputs.image_tokens
    MARKS = auto()  # DecoderInputs.marks, which the rule makes before layer 0
    HIDDEN_STATES = auto()  # DecoderInputs.hidden_states
    NORMED_STATES = auto()  # DecoderInputs.normed_states
    IMAGE_PREDICTOR = auto()  # DecoderInputs.image_predictor


@dataclass(frozen=True)
class Sizes:
    """What the products follow from that a selector makes of its own."""

    image_tokens: int  # that enter: of one run (vision) or of one sample (decoder)
    text_tokens: int = 0  # of one sample
    query: int = 0  # features of the queries that tokens are scored by, heads * head_dim
    key: int = 0  # features of the keys beside them, kv_heads * head_dim
    hidden: int = 0  # width of the hidden states
    tower: int = 0  # width of the vision tower
    tower_heads: int = 1
    # Tokens whose attention ranks patches: the CLS token, or all where there is none.
    tower_queries: int = 1

    @property
    def tower_attention(self) -> Product:
        """Scores of one layer of the tower."""
        keys = self.image_tokens + (self.tower_queries == 1)
        return self.tower_queries, keys, self.tower


class Selector(Arguments, ABC):
    """A rule that picks image tokens; a frozen dataclass whose fields are its arguments."""

    needs: ClassVar[Needs] = Needs.NOTHING
    # Whether it scores by one row of attention, which the operator ``select_tokens`` computes.
    scores_by_attention: ClassVar[bool] = False

    @property
    def renumbers(self) -> bool:
        """Whether tokens that are left get new position ids, without gaps, in decoding too."""
        return False

    @property
    def is_adaptive(self) -> bool:
        """Whether the content decides how many tokens are left."""
        return False

    @property
    def tower_part(self) -> TowerSelector | None:
        """What it does inside the vision tower, as its stage at layer 0; None for nothing."""
        return None

    def at_layer(self, layer: int) -> Selector:
        """What works at one of `layers`: its part in the vision tower, or the selector itself."""
        return (None if layer else self.tower_part) or self

    def scored_layers(self, layer: int) -> int:
        """By how many layers before one of `layers` it scores tokens, with `Needs.QUERY_KEY`."""
        return 1

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that are the first to see a smaller set, ascending; (0,) for vision."""

    @abstractmethod
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """How many image tokens of one run (vision) or sample are left from each of `layers` on.

        One count per layer: exact, or for an adaptive selector with a cap the most that it leaves.
        None where it depends on the content, and may be all of them.
        """

    def counts_of_sample(
        self, image_tokens: int, per_run: int = 0, tiles: tuple[int, int] = (1, 0)
    ) -> tuple[int | None, ...]:
        """The same for one sample, as `counts` says it for what the selector looks at.

        `per_run`: image tokens that one run of the vision encoder yields; 0 where unknown. `tiles`:
        runs of its tower in that, and patches of each, see `planner.ir.structure.tiles`.
        """
        return self.counts(image_tokens)

    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """Products of matrices that choosing takes at one of `layers`, of one run or sample, at
        most.

        What ``select_tokens`` computes, see `scores_by_attention`, is not among them.
        """
        return ()

    def parameters(self, width: int) -> int:
        """Of what is trained to choose, beside a decoder of this width."""
        return 0


@dataclass(frozen=True)
class Positioned(Selector):
    """A selector behind which the authors' code numbers tokens anew."""

    # ``contiguous``: position ids without gaps. ``original``: those of the prompt as it was.
    positions: str = field(default="contiguous", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        good = self.positions in ("contiguous", "original")
        self.check("positions", good, "contiguous or original")

    @property
    @override
    def renumbers(self) -> bool:
        return self.positions == "contiguous"


@dataclass(frozen=True)
class VisionSelector(Positioned):
    """A selector that works between the vision tower and the projector.

    It needs the attention of the tower's layers `tower_layers`. Features go into the prompt in the
    selector's order, at contiguous positions, as all authors' code has it; with
    ``positions=original`` each goes back to the place and position of its patch.
    """

    tower_layers: ClassVar[tuple[int, ...]] = ()
    # Whether there is a published variant for towers without a CLS token, such as SigLIP's.
    without_cls: ClassVar[bool] = False

    @property
    @override
    def layers(self) -> tuple[int, ...]:
        return (0,)

    def check_in(self, graph: Graph) -> None:
        """Raise InputError where it cannot work in front of the projector of a graph."""
        projector = Projector.of(graph)
        for layer in self.tower_layers:
            ranking_attention(graph, layer, self.name)
        if Needs.PROJECTED in self.needs:
            return
        has_cls = projector.is_given_cls(graph)
        if projector.merges or (self.tower_layers and has_cls is None):
            raise merges_patches(self.name)
        if self.tower_layers and not (has_cls or self.without_cls):
            raise without_cls_token(self.name)

    def counts_of_picture(self, tiles: int, patches: int) -> tuple[int | None, ...]:
        """As `counts`, for all tiles of one picture, of so many patches each."""
        return tuple(None if count is None else tiles * count for count in self.counts(patches))

    @override
    def counts_of_sample(
        self, image_tokens: int, per_run: int = 0, tiles: tuple[int, int] = (1, 0)
    ) -> tuple[int | None, ...]:
        """Run by run; tokens that no run yields, such as the ends of lines between tiles, stay.

        Raises:
            InputError: tiles have lost their padding, so it is not known how much is left of each.
        """
        if not per_run:
            return self.counts(image_tokens)
        of_tower, patches = tiles
        if of_tower > 1:
            images, rest = divmod(image_tokens, per_run)
            if rest:
                raise InputError(
                    f"{self} picks patches tile by tile, and this picture's tiles are cut to its "
                    f"shape, so how many tokens are left cannot be promised; take a selector that "
                    f"works in the decoder, such as fastv"
                )
            ends = per_run - of_tower * patches
            return tuple(
                None if count is None else images * (count + ends)
                for count in self.counts_of_picture(of_tower, patches)
            )
        runs, others = -(-image_tokens // per_run), image_tokens % per_run
        return tuple(
            None if count is None else min(image_tokens, runs * count + others)
            for count in self.counts(per_run)
        )


@dataclass(frozen=True)
class PatchStage:
    """Patches are reduced before a layer of the vision tower."""

    layer: int  # the first that sees fewer
    keep: int  # patches of each run
    scored: int  # by the attention of how many layers before it
    products: tuple[Product, ...] = ()  # that choosing takes, in each run


class TowerSelector(VisionSelector):
    """A vision selector that drops patches between layers of the vision tower."""

    needs = Needs.TOWER_ATTENTION

    @abstractmethod
    def patch_stages(self, tower: VisionTower) -> tuple[PatchStage, ...]:
        """Where it drops patches in a tower; InputError where that has too few layers."""

    def stages_in(self, graph: Graph) -> tuple[PatchStage, ...]:
        """The same in the tower of a graph; InputError where it cannot work there."""
        tower = VisionTower.of(graph)
        if not tower.has_cls and not self.without_cls:
            raise without_cls_token(self.name)
        return self.patch_stages(tower)

    @property
    @override
    def tower_part(self) -> TowerSelector:
        return self


def merges_patches(selector: str) -> InputError:
    """For a selector of patches, in front of a projector that makes one feature of several."""
    return InputError(
        f"{selector} picks patches, and this projector merges neighbouring ones; use a selector "
        "that works in the decoder, such as fastv"
    )


def without_cls_token(selector: str) -> InputError:
    """For a selector that was published with a CLS token alone, on a tower without one."""
    return InputError(
        f"{selector} ranks patches by the attention of a CLS token, which this vision tower does"
        " not have; take visionzip, fastervlm or vispruner, which do without, or a selector that"
        " works in the decoder, such as fastv."
    )


class DecoderSelector(Selector):
    """A selector that works inside the decoder."""

    # In a plan, a name alone keeps what its stage says.
    shown = 1

    @classmethod
    def at(cls, layer: int, keep: int, of: int) -> Self:
        """The selector of this kind that keeps `keep` of `of` tokens from `layer` on.

        A kind that cannot keep any number is taken at its defaults; InputError where it has none.
        """
        return cls.read({})
