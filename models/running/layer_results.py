"""What a decoder layer returns: the hidden states, alone or at the head of a tuple.

Falcon, Bloom, GPT-Neo and MPT return tuples, whose other places hold attention weights or what one
layer hands to the next. A layer that is left out must return as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from planner.ir.errors import InputError
from planner.models.running.attention_blocks import arguments_of


@dataclass(frozen=True)
class LayerResult:
    """What a layer returns when it is left out."""

    # For each place behind the hidden states the argument that is handed on there; '' where the
    # layer computes what stands there, and None takes its place. None where there is no tuple.
    others: tuple[str, ...] | None = None
    # First dimension of the layer's other arguments where there is one sample.
    leading: Mapping[str, int] = field(default_factory=dict)

    def left_out(self, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        """Of a layer with these arguments."""
        if self.others is None:
            return hidden
        return (hidden, *(kwargs.get(name) if name else None for name in self.others))


@torch.no_grad()
def result_of(decoder: nn.Module, layer: nn.Module, width: int) -> LayerResult:
    """Find out what a layer takes and returns, by running the decoder on a few tokens.

    Nothing of the decoder, the text model of this width, may be narrowed at the time.
    """
    try:
        arguments = arguments_of(decoder, layer, width)
        output = layer(**arguments)
    except Exception:
        # A decoder that takes more than embeddings (cross-attention layers without an image, say):
        # if its layer does return a tuple, whoever meets the tuple says so.
        return LayerResult()
    leading = {
        name: len(value)
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.ndim
    }
    if not isinstance(output, tuple):
        return LayerResult(None, leading)
    others = (
        next(
            (name for name, given in arguments.items() if value is not None and given is value), ""
        )
        for value in output[1:]
    )
    return LayerResult(tuple(others), leading)


def with_hidden(output: Any, hidden: Tensor, *, whole: bool) -> Any:
    """A layer's result with other hidden states.

    Unless its other places are of the whole batch, None takes their place.
    """
    if isinstance(output, Tensor):
        return hidden
    return (hidden, *(output[1:] if whole else [None] * (len(output) - 1)))


def hidden_of(output: Any) -> Tensor:
    """The hidden states of a layer's result; raises InputError where there are none."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise InputError(f"a layer returned a {type(first).__name__} instead of hidden states")
    return first
