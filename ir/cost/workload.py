"""The workload: how many tokens and samples a cost is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

from planner.ir.errors import InputError
from planner.ir.graph import Graph

DEFAULT_TEXT_TOKENS = 64
DEFAULT_NEW_TOKENS = 64

_LEAST = {"image_tokens": 0, "text_tokens": 0, "new_tokens": 0, "batch": 1}
# What is known of a prompt at hand besides.
_COUNTED = ("encoded_tokens", "logits", "encoder_flops")
# Of each count; what they come to together is for pricing to judge.
_MOST = 10**8


@dataclass(frozen=True, slots=True)
class Workload:
    """Token counts of one request, per sample, and how many requests run together."""

    image_tokens: int  # visual tokens among the decoder's
    text_tokens: int = DEFAULT_TEXT_TOKENS  # prompt tokens besides them
    new_tokens: int = DEFAULT_NEW_TOKENS  # tokens generated after the first one: decode steps
    batch: int = 1
    image_tokens_per_run: int = 0  # visual tokens that one run of the vision encoder yields
    logits: int = 1  # tokens of a sample that the output embedding is computed for
    # FLOPs of what runs in front of the decoder, where they were counted; None leaves them to the
    # Graph.
    encoder_flops: int | None = None
    encoded_tokens: int = 0  # of an encoder's output that the decoder attends to beside its own

    def __post_init__(self) -> None:
        for name, least in {**_LEAST, "logits": 0, "encoded_tokens": 0}.items():
            _check(name, getattr(self, name), least, _MOST)
        if self.encoder_flops is not None:
            _check("encoder_flops", self.encoder_flops, 0, _MOST**2)
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
        """One image (one run of the vision encoder) and 64 text tokens unless told otherwise.

        Where the decoder attends to image features beside its tokens, they are the image tokens; an
        encoder of words is given as many as the decoder.
        """
        beside = "encoded_tokens" in graph.properties
        per_run = int(graph.properties.get("encoded_tokens" if beside else "image_tokens", 0))
        images = per_run if image_tokens is None else image_tokens
        load = Workload(0 if beside else images, text_tokens, new_tokens, batch, per_run)
        return replace(load, encoded_tokens=images or text_tokens) if beside else load

    @staticmethod
    def stated(graph: Graph, facts: Mapping[str, Any]) -> Workload | None:
        """The workload whose `facts` these are, among others; None where some are missing."""
        if not all(name in facts for name in _LEAST):
            return None
        load = Workload.default(graph, *(facts[name] for name in _LEAST))
        counted = {name: facts[name] for name in _COUNTED if name in facts}
        return replace(load, **counted)

    @property
    def facts(self) -> dict[str, int]:
        """What a plan's file states of it."""
        stated = {name: getattr(self, name) for name in _LEAST}
        return stated | {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in _COUNTED and getattr(self, field.name) != field.default
        }

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prefill, per sample."""
        return self.image_tokens + self.text_tokens

    @property
    def images(self) -> int:
        """Runs of the vision encoder, per batch."""
        if not self.image_tokens_per_run:
            return 0
        seen = self.image_tokens + self.encoded_tokens
        return self.batch * math.ceil(seen / self.image_tokens_per_run)

    def prefill(self, kept: Mapping[int, int] | None = None) -> dict[str, int]:
        """Sizes of all symbols in the prefill; `kept` are image tokens left after a token stage,
        by its layer."""
        sizes = {"batch": self.batch, "images": self.images}
        sizes["query"] = sizes["context"] = self.prompt_tokens
        sizes["encoding"] = sizes["encoded"] = self.encoded_tokens
        for layer, tokens in (kept or {}).items():
            sizes[f"query.{layer}"] = sizes[f"context.{layer}"] = self.text_tokens + tokens
        return sizes

    def decode(self, step: int, kept: Mapping[int, int] | None = None) -> dict[str, int]:
        """Sizes of all symbols in decode step `step` (1 is the first after the prefill)."""
        sizes = {"batch": self.batch, "images": 0, "query": 1}
        sizes["context"] = self.prompt_tokens + step
        sizes |= {"encoding": 0, "encoded": self.encoded_tokens}
        for layer, tokens in (kept or {}).items():
            sizes[f"query.{layer}"] = 1
            sizes[f"context.{layer}"] = self.text_tokens + tokens + step
        return sizes


def _check(name: str, value: Any, least: int, most: int) -> None:
    said = name.replace("_", "-")
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole:
        raise InputError(f"{said} must be a whole number, not {value!r:.40}")
    if value < least:
        raise InputError(f"{said} must be at least {least}, not {value}")
    if value > most:
        raise InputError(f"{said} must be at most {most}, and it is larger")
