"""Prompts for a small model: some words and, where the model takes one, an image among them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.ir.lowering.attempts import first_success
from planner.ir.lowering.example_inputs import vision_inputs
from planner.ir.lowering.vision_side import features_of, vision_config_of
from planner.loading import visual_tokens

_FIRST_WORD, _LAST_WORD = 3, 300
# Arguments that tell image tokens from words.
_MARKS = ("token_type_ids", "position_mask")
# Dimensions of pictures cut to tiles: sample, picture, tile, channel, row, column.
_TILED = 6


@dataclass(frozen=True)
class Prompts:
    """Makes prompts of one model."""

    # Placeholders of one image; 0 where prompts are words alone, or layers attend to the image
    # beside them.
    image_tokens: int = 0
    placeholder: int = -1  # the token that stands for image features
    opening: int = -1  # the token before it; -1 for any word
    pixels: dict[str, Tensor] = field(default_factory=dict)  # arguments for one image
    accepted: tuple[str, ...] = ("input_ids", "attention_mask")  # names of all that the model takes

    def of(self, *lengths: int) -> dict[str, Tensor]:
        """A prompt of so many words a row, padded on the left; a length always has the same words.

        A decoder beside an encoder of words gets the same as that.

        `lengths`: words of each row; each row has one image besides.
        """
        longest = max(lengths) + self.image_tokens
        ids = torch.zeros(len(lengths), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            generator = torch.Generator().manual_seed(length)
            words = torch.randint(_FIRST_WORD, _LAST_WORD, (length,), generator=generator)
            if self.image_tokens and self.opening >= 0:
                words[1] = self.opening
            image = torch.full((self.image_tokens,), self.placeholder)
            start = longest - length - self.image_tokens
            ids[row, start:] = torch.cat([words[:2], image, words[2:]])
            mask[row, start:] = 1
        known = {
            **dict.fromkeys(("input_ids", "decoder_input_ids"), ids),
            **dict.fromkeys(("attention_mask", "decoder_attention_mask"), mask),
            # All on one page, in front of one image.
            "bbox": torch.full((*ids.shape, 4), 0.5),
            "image_attention_mask": mask[..., None],
        }
        if "input_ids" not in self.accepted:
            # Then it is of the encoder, which sees no words.
            del known["attention_mask"]
        shown = self.pixels.get("pixel_values")
        if shown is not None and shown.ndim == _TILED:
            known["cross_attention_mask"] = mask[..., None, None].repeat(1, 1, *shown.shape[1:3])
        for name in self.accepted:
            if name.endswith(_MARKS):
                known[name] = (ids == self.placeholder).long()
        prompt = {name: value for name, value in known.items() if name in self.accepted}
        for name, value in self.pixels.items():
            prompt[name] = torch.cat([value] * len(lengths))
        return prompt


def prompts_of(model: Any) -> Prompts:
    """Prompts with an image where one is found that the model takes; of words otherwise.

    `model`: with weights. Raises InputError: it takes neither.
    """
    words = 5
    accepted = tuple(
        name
        for name in inspect.signature(model.forward).parameters
        if model.config.is_encoder_decoder or not name.startswith("decoder_")
    )

    def tried(prompts: Prompts) -> Prompts:
        with torch.no_grad():
            model(**prompts.of(words))
        return prompts

    candidates = (*_with_image(model, accepted), Prompts(accepted=accepted))
    found, failure = first_success(partial(tried, p) for p in candidates)
    if found is None:
        raise InputError(f"no prompt is found that the stock model takes ({failure})")
    return found


def _with_image(model: Any, accepted: tuple[str, ...]) -> Iterator[Prompts]:
    config = vision_config_of(model)
    opening = getattr(model.config, "vision_start_token_id", None)
    placeholder = next(iter(visual_tokens(model.config, "image", "video")), None)
    if placeholder is None and any(name.endswith(_MARKS) for name in accepted):
        placeholder = _FIRST_WORD - 1
    function = features_of(model)
    if function is not None and placeholder is not None:
        for inputs in vision_inputs(config, function):
            pixels = {name: _drawn(name, value) for name, value in inputs.items()}
            try:
                with torch.no_grad():
                    features = _rows(function(**pixels))
            except Exception:
                continue
            given = {n: v for n, v in pixels.items() if isinstance(v, Tensor)}
            before = -1 if opening is None else opening
            yield Prompts(features, placeholder, before, given, accepted)
    # Layers that attend to the image, or an encoder that puts it in front.
    for inputs in vision_inputs(config, model.forward):
        pixels = {name: _drawn(name, value) for name, value in inputs.items()}
        given = {n: v for n, v in pixels.items() if isinstance(v, Tensor) and n in accepted}
        if any("pixel" in name or "patch" in name for name in given):
            yield Prompts(pixels=given, accepted=accepted)


def _drawn(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    generator = torch.Generator().manual_seed(1)
    if value.is_floating_point():
        return torch.rand(value.shape, generator=generator)
    if name.endswith("input_ids"):
        return torch.randint(_FIRST_WORD, _LAST_WORD, value.shape, generator=generator)
    return torch.ones(value.shape, dtype=value.dtype)


def _rows(features: Any) -> int:
    """How many image features there are in what ``get_image_features`` returns."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            return _rows(getattr(features, name))
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    return sum(_rows(part) for part in features)
