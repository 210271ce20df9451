"""Selectors that compare patches with the question, in CLIP's joint space of pictures and texts.

LLaVA's vision tower is CLIP's, but a checkpoint holds neither the text tower nor the projections
into the joint space. So these selectors are given the folder of the CLIP model that the tower
belongs to, as in ``trim:clip=FOLDER``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import override

from planner.documents import read_json, validated
from planner.ir.errors import InputError
from planner.planning.selectors.arguments import Count, Share
from planner.planning.selectors.in_vision import Adaptive
from planner.planning.selectors.selector import Needs, Product, Sizes, VisionSelector


class _TextSide(BaseModel):
    model_config = ConfigDict(frozen=True)

    hidden_size: int = Field(default=512, gt=0)
    intermediate_size: int = Field(default=2048, gt=0)
    num_hidden_layers: int = Field(default=12, ge=0)
    max_position_embeddings: int = Field(default=77, gt=1)


class _VisionSide(BaseModel):
    model_config = ConfigDict(frozen=True)

    hidden_size: int = Field(default=768, gt=0)


class ClipSizes(BaseModel):
    """What a CLIP model's ``config.json`` says of its text tower and of the joint space."""

    model_config = ConfigDict(frozen=True)

    text_config: _TextSide = _TextSide()
    vision_config: _VisionSide = _VisionSide()
    projection_dim: int = Field(default=512, gt=0)

    @staticmethod
    def read(folder: str | Path) -> ClipSizes:
        """Of a folder; InputError where it holds no CLIP model's config, or a broken one."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise InputError(f"'{folder}' holds no CLIP model: no config.json")
        return _read(path, path.stat().st_mtime_ns)

    def chunks(self, text_tokens: int) -> int:
        """Runs of the text tower that a question of so many tokens takes."""
        return max(1, -(-text_tokens // self.text_config.max_position_embeddings))

    def text_products(self, chunks: int) -> tuple[Product, ...]:
        """What the text tower multiplies for so many chunks of a question."""
        text = self.text_config
        tokens, width, inner = (
            text.max_position_embeddings,
            text.hidden_size,
            text.intermediate_size,
        )
        layer = (
            *((tokens, width, width),) * 4,
            *((tokens, tokens, width),) * 2,
            (tokens, inner, width),
            (tokens, width, inner),
        )
        return (*layer * text.num_hidden_layers, (1, self.projection_dim, width)) * chunks

    def patch_products(self, patches: int, chunks: int) -> tuple[Product, ...]:
        """Patches into the joint space, and their products with a question's chunks."""
        joint = self.projection_dim
        return (patches, joint, self.vision_config.hidden_size), (chunks, patches, joint)

    @property
    def parameters(self) -> int:
        """Of the text tower's linears and both projections."""
        text, joint = self.text_config, self.projection_dim
        layer = 4 * text.hidden_size**2 + 2 * text.hidden_size * text.intermediate_size
        sides = text.hidden_size + self.vision_config.hidden_size
        return layer * text.num_hidden_layers + joint * sides


@lru_cache(maxsize=16)
def _read(path: Path, _stamp: int) -> ClipSizes:
    document = read_json(path, "CLIP config")
    if not isinstance(document, dict) or document.get("model_type") != "clip":
        raise InputError(f"'{path}' is no config of a CLIP model with both of its towers")
    return validated(ClipSizes, document, str(path))


class TextGuided(VisionSelector):
    """A selector that compares patches with the question by the CLIP model in a folder."""

    needs = Needs.TEXT_EMBEDDING
    clip: str | None

    @classmethod
    @override
    def read(cls, arguments: Mapping[str, str]) -> Self:
        if "clip" in arguments:
            arguments = {**arguments, "clip": str(Path(arguments["clip"]).resolve())}
        return super().read(arguments)

    @property
    def sizes(self) -> ClipSizes | None:
        """Of the CLIP model; None where none is named, and the selector cannot run."""
        return None if self.clip is None else ClipSizes.read(self.clip)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """The text tower, in chunks, and the scores."""
        known = self.sizes
        if known is None:
            return ((1, sizes.image_tokens, sizes.tower),)
        chunks = self.chunks(sizes.text_tokens)
        scores = known.patch_products(sizes.image_tokens, chunks)
        return (*known.text_products(chunks), *scores)

    def chunks(self, text_tokens: int) -> int:
        """Chunks of a question that are compared: the first alone, what is behind is cut off."""
        return 1

    @override
    def parameters(self, width: int) -> int:
        known = self.sizes
        return 0 if known is None else known.parameters


@dataclass(frozen=True)
class TRIM(TextGuided, Adaptive):
    """Keep patches by CLIP similarity to the prompt, in order, and the mean of all others.

    Adaptive (no ratio): those whose score lies above Q3 + 1.5 IQR of their own picture; else the
    best int(n ratio). Song et al., "Less is More: A Simple yet Effective Token Reduction Method for
    Efficient Multi-modal LLMs" (arXiv 2409.10994), after the released code's ``TextSim+``, which
    takes one quartile over the whole batch and keeps equally many of each picture. With a cap at
    most int(n max) tokens are left of a picture, the mean of the others among them: where the rule
    says more, the patches with the highest scores.

    Runs with ``clip``, and where `planner.question` says what is asked.
    """

    name = "trim"
    ratio: Share | None = None  # of patches kept; None is adaptive
    max: float | None = None  # largest share that the adaptive rule leaves; None is no cap
    clip: str | None = None  # folder of the CLIP model whose vision tower it is

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        """int(tokens ratio) and one for the others; where adaptive at most the cap."""
        if self.ratio is None:
            return super().counts(tokens)
        kept = int(tokens * self.ratio)
        return (kept + (kept < tokens),)


@dataclass(frozen=True)
class CDPruner(TextGuided):
    """Keep patches that matter to the question and are unlike each other, in raster order.

    Greedy maximum a posteriori of a determinantal point process: the kernel is the cosine of the
    projected features, times both patches' relevance. Relevance is the *negated* cosine to the
    question in CLIP's joint space, the mean over the question's chunks, shifted and scaled to 0 to
    1 picture by picture (the reference takes the extremes of the batch, which is one picture
    there). Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for
    Token Pruning in MLLMs" (arXiv 2506.10967), after the released code; the paper's text has
    relevance without the minus. All patches are projected, as in the code.

    Runs with ``clip``, and where `planner.question` says what is asked.
    """

    name = "cdpruner"
    needs = Needs.TEXT_EMBEDDING | Needs.PROJECTED
    keep: Count  # of each picture or tile
    clip: str | None = None  # folder of the CLIP model whose vision tower it is

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        return (min(self.keep, tokens),)

    @override
    def chunks(self, text_tokens: int) -> int:
        """All that the question has."""
        return 1 if self.sizes is None else self.sizes.chunks(text_tokens)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """Relevance, cosines of all patches, and in every turn what was kept to all patches."""
        patches = sizes.image_tokens
        kept = min(self.keep, patches)
        turns = ((1, patches, kept * (kept - 1) // 2),) if kept > 1 else ()
        return (*super().products(layer, sizes), (patches, patches, sizes.hidden), *turns)
