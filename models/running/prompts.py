"""How large a prompt is: read off the arguments of a pass, and counted where nothing says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from planner.ir.cost import Workload
from planner.ir.lowering.decoder import head_of
from planner.ir.lowering.example_inputs import ENCODED
from planner.loading import visual_tokens
from planner.models.running.attention_blocks import named
from planner.models.running.encoders import OF_TEXT, Encoders


class Prompts:
    """Reads the prompts of one model.

    Args:
        way: the model, its decoder, and what lies between them.

    Attributes:
        encoders: what runs in front of the decoder.
    """

    def __init__(self, way: Sequence[nn.Module]) -> None:
        self._way = way
        self.encoders = Encoders(way)

    def read(
        self,
        call: tuple[nn.Module, Any, Any],
        given: Mapping[str, Any],
        new: int,
        first: nn.Module,
    ) -> Workload:
        """The prompt that a decoder is given.

        In a padded batch that is the prompt as the base model runs it, with as many image tokens as
        the sample with the fewest has: no more than those are sure to be dropped.

        Args:
            call: a module of the way and its arguments: what the pass began with.
            given: the decoder's arguments by name.
            new: tokens that will be generated.
            first: the decoder's first layer.
        """
        arguments = named(*call)
        embeddings = given.get("inputs_embeds")
        batch, tokens = (given["input_ids"] if embeddings is None else embeddings).shape[:2]
        ids, images = arguments.get("input_ids"), 0
        if isinstance(ids, Tensor) and tuple(ids.shape) == (batch, tokens):
            images = int(is_visual(ids, self._way[0]).sum(1).min())
        states = [given[name] for name in ENCODED if isinstance(given.get(name), Tensor)]
        encoded = sum(state.shape[:-1].numel() // batch for state in states)
        spent = self.encoders.take_spent()
        entered = self.encoders.entering(given, first)
        if entered is not None:
            spent += entered.flops
            # What encoders inside the decoder put out has joined the words, or lies beside them.
            encoded += entered.encoded // batch if entered.tokens == tokens else 0
            tokens = entered.tokens
        sees = any(
            value is not None and name not in OF_TEXT
            for name, value in arguments.items()
            if isinstance(value, Tensor | Mapping)
        )
        return Workload(
            images,
            tokens - images,
            new,
            batch,
            logits=self._logits(call[0], arguments.get("logits_to_keep", 0), tokens),
            encoder_flops=spent if sees else 0,
            encoded_tokens=encoded,
        )

    def _logits(self, module: nn.Module, keep: Any, tokens: int) -> int:
        """Tokens of a sample that the output embedding is computed for, at most."""
        model: Any = self._way[0]
        if head_of(model) is None:
            return 0
        # What a wrapper calls may lie inside the model, and the output embedding outside of that.
        if module is not model:
            return tokens
        return min(tokens, (keep.numel() if isinstance(keep, Tensor) else int(keep)) or tokens)


def is_visual(ids: Tensor, model: nn.Module, *kinds: str) -> Tensor:
    """Which tokens stand for parts of images or videos, or of one kind, bool; `ids`'s shape."""
    tokens = visual_tokens(model.config, *kinds)
    return torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype, device=ids.device))
