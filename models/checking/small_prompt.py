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
from planner.ir.lowering.vision_side import features_of
from planner.loading import visual_tokens

_FIRST_WORD, _LAST_WORD = 3, 300


@dataclass(frozen=True)
class Prompts:
    """Makes prompts of one model.

    Attributes:
        image_tokens: placeholders of one image; 0 where prompts are words alone.
        placeholder: the token that stands for image features.
        pixels: arguments for one image.
        kinds: name of the argument that tells image tokens from words, "" where there is none.
    """

    image_tokens: int = 0
    placeholder: int = -1
    pixels: dict[str, Tensor] = field(default_factory=dict)
    kinds: str = ""

    def of(self, *lengths: int) -> dict[str, Tensor]:
        """A prompt of so many words a row, padded on the left; a length always has the same words.

        Args:
            lengths: words of each row; each row has one image besides.
        """
        longest = max(lengths) + self.image_tokens
        ids = torch.zeros(len(lengths), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            generator = torch.Generator().manual_seed(length)
            words = torch.randint(_FIRST_WORD, _LAST_WORD, (length,), generator=generator)
            image = torch.full((self.image_tokens,), self.placeholder)
            start = longest - length - self.image_tokens
            ids[row, start:] = torch.cat([words[:2], image, words[2:]])
            mask[row, start:] = 1
        prompt = {"input_ids": ids, "attention_mask": mask}
        if self.kinds:
            prompt[self.kinds] = (ids == self.placeholder).long()
        for name, value in self.pixels.items():
            prompt[name] = torch.cat([value] * len(lengths))
        return prompt


def prompts_of(model: Any) -> Prompts:
    """Prompts with an image where one is found that the model takes; of words otherwise.

    Args:
        model: with weights.

    Raises:
        InputError: it takes neither.
    """
    words = 5

    def tried(prompts: Prompts) -> Prompts:
        with torch.no_grad():
            model(**prompts.of(words))
        return prompts

    found, failure = first_success(partial(tried, p) for p in (*_with_image(model), Prompts()))
    if found is None:
        raise InputError(f"no prompt is found that the stock model takes ({failure})")
    return found


def _with_image(model: Any) -> Iterator[Prompts]:
    function = features_of(model)
    placeholder = next(iter(visual_tokens(model.config, "image")), None)
    if placeholder is None:
        return
    accepted = inspect.signature(model.forward).parameters
    kinds = next((name for name in accepted if name.endswith("token_type_ids")), "")
    if function is None:
        return
    config = getattr(model.config, "vision_config", None) or model.config
    for inputs in vision_inputs(config, function):
        pixels = {name: _drawn(name, value) for name, value in inputs.items()}
        try:
            with torch.no_grad():
                features = _rows(function(**pixels))
        except Exception:
            continue
        given = {n: v for n, v in pixels.items() if isinstance(v, Tensor)}
        yield Prompts(features, placeholder, given, kinds)


def _drawn(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    generator = torch.Generator().manual_seed(1)
    if value.is_floating_point():
        return torch.rand(value.shape, generator=generator)
    return torch.randint(_FIRST_WORD, _LAST_WORD, value.shape, generator=generator)


def _rows(features: Any) -> int:
    """How many image features there are in what ``get_image_features`` returns."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            return _rows(getattr(features, name))
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    return sum(_rows(part) for part in features)
