"""Selectors that drop tokens inside the vision tower, and in the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from typing_extensions import override

from planner.ir.errors import InputError
from planner.ir.vision_tower import VisionTower
from planner.planning.selectors.arguments import Part, Several
from planner.planning.selectors.selector import (
    DecoderSelector,
    Needs,
    PatchStage,
    Positioned,
    Product,
    Sizes,
    TowerSelector,
)


def shrinking(tokens: int, share: float, steps: int) -> tuple[int, ...]:
    """How many of `tokens` each of so many steps leaves, the last one a share of them.

    Every step leaves the same share of what it is given; numbers are rounded half to even, and one
    is always left.
    """
    return tuple(
        min(tokens, max(1, round(tokens * share ** (step / steps)))) for step in range(1, steps + 1)
    )


def rollout_products(tokens: int, width: int, layers: int) -> tuple[Product, ...]:
    """Attention of all tokens to all, and what one row becomes by it, in each of some layers."""
    return ((tokens, tokens, width), (1, tokens, tokens)) * layers


@dataclass(frozen=True)
class IVTP(Positioned, DecoderSelector):
    """Drop patches inside the vision tower, and image tokens in the first layers of the decoder.

    Huang et al., "IVTP: Instruction-guided Visual Token Pruning for Large Vision-Language Models"
    (ECCV 2024). There is no public code: this is a reimplementation after the paper's description.

    *Group-wise token pruning.* Layers of the tower are divided into groups of three. At the end of
    each group patches go to which the CLS token has attended least in the group. That is attention
    rollout: the product of (A + I) / 2 over the group's layers, A the mean over heads.

    *Instruction-guided pruning.* The same in groups of the decoder's layers, where a pseudo CLS
    token stands for the instruction: the mean of the text tokens that fit the picture.

    What the paper's description leaves open, and how it is here:

    - Groups are counted from the first layer of the tower. None ends at its last layer, or where
      the features are made: nothing would be saved. In the decoder a group ends before each of `k`,
      and begins at the one before, or `group` layers earlier.
    - Every group leaves the same share of what it is given: of n patches round(n tower^(i / g))
      behind the i-th of g groups. So does every stage in the decoder. The defaults leave a third
      each, of 576 patches 192 and then 64, the 88.9 % fewer of the paper.
    - What is dropped is gone; nothing is merged.
    - Text tokens are those of the prompt behind its last image token. They fit the picture where
      their cosine to it, before the first layer, is no lower than their mean; the picture is the
      mean of its image tokens' directions. The paper compares CLIP's text embeddings with the
      tower's CLS token instead; a LLaVA checkpoint holds no text tower, and CLIP's tokens are not
      the decoder's. Without text behind the image the last token stands for it.
    - Position ids are contiguous behind every stage.
    """

    name = "ivtp"
    needs = Needs.QUERY_KEY | Needs.MARKS | Needs.IMAGE_TOKENS
    shown = 1
    tower: Part = 1 / 3  # share of the patches that leaves the tower
    decoder: Part = 1 / 3  # share of those that is left behind the last of k
    k: tuple[int, ...] = (3, 6, 9, 12)  # decoder layers that are the first to see fewer tokens
    group: Several = 3  # layers of a group

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = len(self.k) > 0 and all(a < b for a, b in pairwise((0, *self.k)))
        self.check("k", ascending, "layers from 1 on, ascending")

    @property
    @override
    def tower_part(self) -> TowerSelector:
        return IVTPTower(self.tower, self.group, positions=self.positions)

    @property
    @override
    def layers(self) -> tuple[int, ...]:
        return (0, *self.k)

    @override
    def scored_layers(self, layer: int) -> int:
        before = max(stage for stage in self.layers if stage < layer)
        return min(self.group, layer - before)

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        return self.counts_of_sample(tokens)

    @override
    def counts_of_sample(
        self, image_tokens: int, per_run: int = 0, tiles: tuple[int, int] = (1, 0)
    ) -> tuple[int | None, ...]:
        (left,) = self.tower_part.counts_of_sample(image_tokens, per_run, tiles)
        assert left is not None
        return (left, *self.left_in_decoder(left))

    def left_in_decoder(self, tokens: int) -> tuple[int, ...]:
        """Image tokens of a sample behind each of `k`, of those that the tower has left."""
        return shrinking(tokens, self.decoder, len(self.k)) if tokens else (0,) * len(self.k)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        tokens = sizes.text_tokens + sizes.image_tokens
        return rollout_products(tokens, sizes.query, self.scored_layers(layer))


@dataclass(frozen=True)
class IVTPTower(TowerSelector):
    """What `IVTP` does in the vision tower."""

    name = "ivtp"
    tower: Part
    group: Several

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        return shrinking(tokens, self.tower, 1)

    @override
    def patch_stages(self, tower: VisionTower) -> tuple[PatchStage, ...]:
        ends = range(self.group, tower.layers, self.group)
        if not ends:
            raise InputError(
                f"{self} prunes patches behind every {self.group} layers of the vision tower, and "
                f"only {tower.layers} of this one make its features: give a smaller group"
            )
        left = shrinking(tower.patches, self.tower, len(ends))
        tokens = (1 + n for n in (tower.patches, *left))
        return tuple(
            PatchStage(end, n, self.group, rollout_products(before, tower.width, self.group))
            for end, n, before in zip(ends, left, tokens, strict=False)
        )
