"""The projectors by name, and LLaVA with one of them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from planner.ir.errors import InputError, check_known
from planner.models.projectors.c_abstractor import CAbstractor
from planner.models.projectors.ldp import LdpV2
from planner.models.projectors.pixel_shuffle import PixelShuffle
from planner.models.projectors.projector import Projector, Sizes
from planner.models.projectors.qwen_resampler import QwenResampler
from planner.models.projectors.resampler import Resampler
from planner.models.projectors.token_packer import TokenPacker
from planner.planning.catalog import Source

_PROJECTORS: Mapping[str, type[Projector]] = {
    "token-packer": TokenPacker,
    "c-abstractor": CAbstractor,
    "resampler": Resampler,
    "qwen-resampler": QwenResampler,
    "pixel-shuffle": PixelShuffle,
    "ldp-v2": LdpV2,
}


class ProjectedLlavaConfig(LlavaConfig):  # type: ignore[misc]
    """LLaVA's config, and a projector's name with its argument: ``token-packer:2``."""

    model_type = "projected_llava"
    projector: str = "token-packer:2"


class ProjectedLlavaForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """Stock LLaVA, but for its projector."""

    config_class = ProjectedLlavaConfig

    def __init__(self, config: ProjectedLlavaConfig) -> None:
        super().__init__(config)
        kind, number = _parse(config.projector, config)
        self.model.multi_modal_projector = kind(_sizes(config), number)


AutoConfig.register(ProjectedLlavaConfig.model_type, ProjectedLlavaConfig)
AutoModelForImageTextToText.register(ProjectedLlavaConfig, ProjectedLlavaForConditionalGeneration)


def projected_config(config: Any, projector: str) -> ProjectedLlavaConfig:
    """The config of a LLaVA with another projector.

    Args:
        config: a LLaVA's, with a square tower.
        projector: ``token-packer:2`` or ``:3``, ``:4``; ``c-abstractor:12``, ``ldp-v2:12``,
            ``qwen-resampler:16``: tokens along a side; ``resampler:144``; ``pixel-shuffle:2``.

    Raises:
        InputError: there is no such projector, it does not fit the grid, or the model is no LLaVA.
    """
    if getattr(config, "model_type", "") != "llava":
        raise InputError("--projector is for LLaVA's architecture (llava-7b, llava-13b)")
    kind, number = _parse(projector, config)
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    values |= {"projector": projector, "architectures": ["ProjectedLlavaForConditionalGeneration"]}
    side = _sizes(config).grid // number if kind.counts == "scale" else number
    values["image_seq_length"] = number if kind.counts == "tokens" else side * side
    if layers := kind.feature_layers(config.vision_config.num_hidden_layers):
        values["vision_feature_layer"] = layers
    made: ProjectedLlavaConfig = ProjectedLlavaConfig.from_dict(values)
    return made


def projected_source(source: Source, projector: str) -> Source:
    """The catalogue's entry of a LLaVA with another projector, without weights; as above."""
    config = projected_config(source.load_config(), projector).to_dict()
    return replace(
        source, name=f"{source.name}+{projector}", config=config, folder=None, hub_id=None
    )


def with_projector(
    model: LlavaForConditionalGeneration, projector: str
) -> ProjectedLlavaForConditionalGeneration:
    """A stock LLaVA's tower, decoder and lm_head, shared, with a new projector between them.

    The projector has random weights, for training; `projector` as for `projected_config`.
    """
    config = projected_config(model.config, projector)
    with torch.device("meta"):
        made = ProjectedLlavaForConditionalGeneration(config)
    kind, number = _parse(projector, config)
    fresh = kind(_sizes(config), number)
    made.model.vision_tower = model.model.vision_tower
    made.model.language_model = model.model.language_model
    made.model.multi_modal_projector = fresh.to(device=model.device, dtype=model.dtype)
    made.lm_head = model.lm_head
    made.train(model.training)
    return made


def fitted_processor(processor: Any, config: ProjectedLlavaConfig) -> Any:
    """A copy of a LLaVA's processor that leaves a place in prompts for every token projected."""
    made = deepcopy(processor)
    # It counts patches of the picture, here one, and the CLS token where that is taken off again.
    made.patch_size = config.vision_config.image_size
    taken_off = made.vision_feature_select_strategy == "default"
    made.num_additional_image_tokens = config.image_seq_length - 1 + taken_off
    return made


def _sizes(config: LlavaConfig) -> Sizes:
    vision = config.vision_config
    return Sizes(
        vision.hidden_size, vision.image_size // vision.patch_size, config.text_config.hidden_size
    )


def _parse(projector: str, config: LlavaConfig) -> tuple[type[Projector], int]:
    """(kind, number) of ``name:number``, checked against the tower's grid."""
    name, _, text = projector.partition(":")
    check_known("projector", name, _PROJECTORS)
    kind = _PROJECTORS[name]
    number = int(text) if text.isdecimal() else 0 if text else kind.default
    grid = _sizes(config).grid
    most = 1024 if kind.counts == "tokens" else grid
    if not 0 < number <= most or (kind.counts == "scale" and grid % number):
        raise InputError(
            f"projector '{projector}': {kind.counts} must be from 1 to {most}"
            + (f" and divide {grid} patches" if kind.counts == "scale" else "")
        )
    return kind, number
