"""The workload: how many tokens and samples a cost is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from planner.ir.errors import InputError
from planner.ir.graph import Graph

DEFAULT_TEXT_TOKENS = 64
DEFAULT_NEW_TOKENS = 64

_LEAST = {"image_tokens": 0, "text_tokens": 0, "new_tokens": 0, "batch": 1}
# Of each count; what they come to together is for pricing to judge.
_MOST = 10**8


@dataclass(frozen=True, slots=True)
class Workload:
    """Token counts of one request, per sample, and how many requests run together."""

    image_tokens: int  # visual tokens that enter the decoder
    text_tokens: int = DEFAULT_TEXT_TOKENS  # prompt tokens besides them
    new_tokens: int = DEFAULT_NEW_TOKENS  # tokens generated after the first one: decode steps
    batch: int = 1
    image_tokens_per_run: int = 0  # visual tokens that one run of the vision encoder yields

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value: Any = getattr(self, name)
            said = name.replace("_", "-")
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if not whole:
                raise InputError(f"{said} must be a whole number, not {value!r:.40}")
            if value < least:
                raise InputError(f"{said} must be at least {least}, not {value}")
            if value > _MOST:
                raise InputError(f"{said} must be at most {_MOST}, and it is larger")
        if self.prompt_tokens == 0:
            raise InputError("the prompt has no tokens: give --text-tokens or --image-tokens")

    @staticmethod
    def default(
        graph: Graph,
        image_tokens: int | None = None,
        text_tokens: int = DEFAULT_TEXT_TOKENS,
        new_tokens: int = DEFAULT_NEW_TOKENS,
        batch: int = 1,
    ) -> Workload:
        """One image (one run of the vision encoder) and 64 text tokens unless told otherwise."""
        per_run = int(graph.properties.get("image_tokens", 0))
        images = per_run if image_tokens is None else image_tokens
        return Workload(images, text_tokens, new_tokens, batch, per_run)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prefill, per sample."""
        return self.image_tokens + self.text_tokens

    @property
    def images(self) -> int:
        """Runs of the vision encoder, per batch."""
        if not self.image_tokens or not self.image_tokens_per_run:
            return 0
        return self.batch * math.ceil(self.image_tokens / self.image_tokens_per_run)

    def prefill(self, kept: Mapping[int, int] | None = None) -> dict[str, int]:
        """Sizes of all symbols in the prefill; `kept` are image tokens left after a token stage,
        by its layer."""
        sizes = {"batch": self.batch, "images": self.images}
        sizes["query"] = sizes["context"] = self.prompt_tokens
        for layer, tokens in (kept or {}).items():
            sizes[f"query.{layer}"] = sizes[f"context.{layer}"] = self.text_tokens + tokens
        return sizes

    def decode(self, step: int, kept: Mapping[int, int] | None = None) -> dict[str, int]:
        """Sizes of all symbols in decode step `step` (1 is the first after the prefill)."""
        sizes = {"batch": self.batch, "images": 0, "query": 1}
        sizes["context"] = self.prompt_tokens + step
        for layer, tokens in (kept or {}).items():
            sizes[f"query.{layer}"] = 1
            sizes[f"context.{layer}"] = self.text_tokens + tokens + step
        return sizes
