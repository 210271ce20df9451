"""Dynamic-LLaVA as plans know it: predictors in a folder, of image tokens and of answer tokens.

The folder holds ``predictors.json`` and ``predictors.safetensors``, as `planner convert` and
`planner train` write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import floor
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from typing_extensions import override

from planner.documents import read_json, validated
from planner.ir.errors import InputError
from planner.planning.selectors.arguments import Layer, Share
from planner.planning.selectors.eviction import AnswerPolicy
from planner.planning.selectors.in_decoder import FromLayer
from planner.planning.selectors.selector import Needs, Product, Sizes

SETTINGS, WEIGHTS = "predictors.json", "predictors.safetensors"
# Transformer blocks of the image predictor.
BLOCKS = 2


class PredictorSettings(BaseModel):
    """What ``predictors.json`` says; by the authors' names, with their values where it is silent.

    Other keys of the authors' are passed over.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    sparse_layer: int = Field(default=2, ge=0)  # the first layer that sees fewer tokens
    vision_keep_rate: float = Field(default=0.2, ge=0, le=1)
    output_text_keep_rate: float = Field(default=0.5, ge=0, le=1)
    # Shorter answers are exempt in training, tokens.
    output_text_len_for_training: int = Field(default=50, ge=0)
    mask_loss_weight: float = Field(default=100.0, ge=0, allow_inf_nan=False)
    use_vision_predictor: bool = True
    use_output_text_predictor: bool = True
    # Width inside both predictors, of which others are multiples and fractions; 512 is published.
    inner_width: int = Field(default=512, ge=8, multiple_of=8)

    @staticmethod
    def read(folder: str | Path) -> PredictorSettings:
        """Of a folder; InputError where it holds none, or broken ones."""
        path = Path(folder) / SETTINGS
        if not path.is_file():
            raise InputError(f"'{folder}' holds no predictors of Dynamic-LLaVA: no {SETTINGS}")
        return _read(path, path.stat().st_mtime_ns)

    @staticmethod
    def of_width(folder: str | Path, width: int) -> PredictorSettings:
        """The same, for a decoder of a width; InputError where weights beside them are for another.

        Without weights, which pricing does not need, any will do.
        """
        weights = Path(folder) / WEIGHTS
        known = _width(weights, weights.stat().st_mtime_ns) if weights.is_file() else width
        if known != width:
            raise InputError(
                f"the predictors in '{folder}' are for a decoder {known} features wide, and this "
                f"one has {width}"
            )
        return PredictorSettings.read(folder)

    @staticmethod
    def of(values: Mapping[str, Any], what: str) -> PredictorSettings:
        """From keys and values; InputError names the first that is unknown or does not fit."""
        if unknown := set(values) - set(PredictorSettings.model_fields):
            known = ", ".join(PredictorSettings.model_fields)
            raise InputError(f"{what} have no setting '{min(unknown)}'; known: {known}")
        return validated(PredictorSettings, values, what)

    @property
    def heads(self) -> int:
        """Attention heads of a block of the image predictor."""
        return 8

    def scorer(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of the linears from inner features to the two logits."""
        inner = self.inner_width
        return (inner // 2, inner), (inner // 4, inner // 2), (2, inner // 4)

    def block(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of the linears of a block: qkv, which has no bias, and others."""
        inner = self.inner_width
        return (3 * inner, inner), (inner, inner), (4 * inner, inner), (inner, 4 * inner)

    def image_products(self, tokens: int, width: int) -> tuple[Product, ...]:
        """All that the image predictor multiplies for so many tokens of a decoder's width."""
        inner = self.inner_width
        linears = (inner, width), *self.block() * BLOCKS, *self.scorer()
        attention = ((tokens, tokens, inner), (tokens, inner, tokens)) * BLOCKS
        return (*((tokens, out, into) for out, into in linears), *attention)

    def image_parameters(self, width: int) -> int:
        """Parameters of the image predictor: 8,572,034 as published, at a width of 4096."""
        inner = self.inner_width
        norms = 4 * inner
        block = sum(out * into + out for out, into in self.block()) - 3 * inner + norms
        return self.output_parameters(width) + BLOCKS * block

    def output_parameters(self, width: int) -> int:
        """Parameters of the output predictor: 2,270,338 as published, at a width of 4096."""
        linears = (self.inner_width, width), *self.scorer()
        return 2 * width + sum(out * into + out for out, into in linears)


@lru_cache(maxsize=16)
def _read(path: Path, _stamp: int) -> PredictorSettings:
    return validated(PredictorSettings, read_json(path, "predictors' settings"), str(path))


@lru_cache(maxsize=16)
def _width(path: Path, _stamp: int) -> int:
    """Of the decoder that weights are for, from their header."""
    try:
        with safe_open(path, "numpy") as weights:
            first = {"image.down_mlp.0.weight", "output.output_mlp.0.weight"} & {*weights.keys()}
            shapes = [weights.get_slice(name).get_shape() for name in first]
    except (OSError, SafetensorError) as error:
        raise InputError(f"the predictors in '{path.parent}' are broken: {error}") from None
    if not shapes:
        raise InputError(f"the predictors in '{path.parent}' are broken: there are none")
    return int(shapes[0][0])


def _with_folder(arguments: Mapping[str, str], name: str) -> tuple[dict[str, str], Path]:
    """Arguments in which the folder is named from the root, and the folder."""
    if "folder" not in arguments:
        raise InputError(f"{name} needs the folder of its predictors, as in {name}:FOLDER.")
    folder = Path(arguments["folder"]).resolve()
    return {**arguments, "folder": str(folder)}, folder


@dataclass(frozen=True)
class DynamicLLaVA(FromLayer):
    """Keep int(n ratio) image tokens from layer k on, those that a trained predictor scores best.

    The image predictor reads what enters layer k, all image tokens of a sample together. Order and
    position ids stay; text and the turns before are never dropped. Huang et al., "Dynamic-LLaVA:
    Efficient Multimodal Large Language Models via Dynamic Vision-language Context Sparsification"
    (arXiv 2412.00876), equation 11, and the released code, whose predictor attends to padding; here
    every sample is predicted as if it were alone. Keep is the first of the two logits, as in the
    code. What of the answer is cached is decided by the KV policy of the same name.

    ``dynamic-llava:FOLDER`` takes layer and ratio from the predictors' settings.
    """

    name = "dynamic-llava"
    leading = "folder"
    needs = Needs.HIDDEN_STATES | Needs.IMAGE_PREDICTOR
    folder: str
    k: Layer
    ratio: Share  # of image tokens kept

    @classmethod
    @override
    def read(cls, arguments: Mapping[str, str]) -> Self:
        arguments, folder = _with_folder(arguments, cls.name)
        if not {"k", "ratio"} <= set(arguments):
            known = PredictorSettings.read(folder)
            defaults = {"k": str(known.sparse_layer), "ratio": str(known.vision_keep_rate)}
            arguments = {**defaults, **arguments}
        return super().read(arguments)

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        return (int(tokens * self.ratio),)

    @override
    def products(self, layer: int, sizes: Sizes) -> tuple[Product, ...]:
        """Those of the image predictor."""
        settings = PredictorSettings.of_width(self.folder, sizes.hidden)
        return settings.image_products(sizes.image_tokens, sizes.hidden)

    @override
    def parameters(self, width: int) -> int:
        return PredictorSettings.of_width(self.folder, width).image_parameters(width)


@dataclass(frozen=True)
class AnswerTokens(AnswerPolicy):
    """From layer k on, cache of a decoded token what a trained predictor says is worth keeping.

    The output predictor reads what enters layer k, each token alone; where "keep", the first logit,
    is the larger one, its keys and values are stored. Decoding without a cache drops tokens of the
    answer so far from layer k on instead, by the same decisions, but the last, which predicts.
    Huang et al., "Dynamic-LLaVA" (arXiv 2412.00876), equation 6. Without a cache the released code
    keeps as many tokens of each sample as the sample that keeps most; here, as in the paper, every
    token is decided alone.

    How many tokens are kept depends on the answer, and may be all of them. With ``max`` never more
    than this share of those decoded so far, rounded down; plans are priced at it.
    """

    name = "dynamic-llava"
    leading = "folder"
    folder: str
    k: Layer  # the first whose cache leaves tokens out
    max: Share = 1.0

    @classmethod
    @override
    def read(cls, arguments: Mapping[str, str]) -> Self:
        arguments, folder = _with_folder(arguments, cls.name)
        if "k" not in arguments:
            arguments = {**arguments, "k": str(PredictorSettings.read(folder).sparse_layer)}
        return super().read(arguments)

    @override
    def most(self, decoded: int) -> int:
        # A share that was given as a quotient means the whole number that it came of.
        return floor(decoded * self.max + 1e-9)

    @override
    def parameters(self, width: int) -> int:
        return PredictorSettings.of_width(self.folder, width).output_parameters(width)
