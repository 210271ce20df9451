"""Conversations as token tensors, several questions packed behind one image.

A training step spends most of its time on the image's tokens, so one image carries several
questions. As *branches* the turns share the image as their prefix and do not see one another:
block-sparse causal attention, and each branch's positions start where the prefix ends, so every
branch is, to the model, the single-turn prompt it will be asked at test time. As a *dialogue* the
turns follow one another under plain causal attention, as LLaVA is trained.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from planner.training.data.conversations import Conversation

IGNORE = -100  # label of positions that are not trained on, as in transformers


@dataclass
class _Row:
    tokens: list[int]
    labels: list[int]
    positions: list[int]
    branches: list[int]  # 0 is the prefix, seen by all


class Packer:
    """Data collator: conversations in LLaVA-1.5's prompt form to a batch for a LLaVA model.

    Prompt form: ``USER: <image>\\nquestion ASSISTANT: answer</s>``, the loss on answers and end
    tokens. Turns that would pass `max_text_tokens` (tokens besides the image) are left out; a
    conversation whose first turn alone is longer is cut there.

    The batch, for B conversations padded to T tokens: `input_ids`, `labels`, `position_ids` (B, T),
    `attention_mask` (B, 1, T, T) boolean, `pixel_values` (images, 3, height, width) when there are
    images.
    """

    def __init__(self, processor: Any, max_text_tokens: int, dialogue_share: float = 0.0):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_text_tokens, self.dialogue_share = max_text_tokens, dialogue_share
        probe = processor(images=Image.new("RGB", (8, 8)), text=processor.image_token)
        image_tokens = list(probe["input_ids"][0]).count(processor.image_token_id)
        self._image = [processor.image_token_id] * image_tokens
        self._start = self._ids("USER:", bos=True)
        self._next = self._ids("USER:")
        self._reply = self._ids("ASSISTANT:")

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """One batch; whether a conversation becomes a dialogue follows from its id."""
        rows = [self._row(c) for c in conversations]
        length = max(len(row.tokens) for row in rows)

        def stack(name: str, fill: int) -> Tensor:
            padded = [getattr(r, name) + [fill] * (length - len(r.tokens)) for r in rows]
            return torch.tensor(padded)

        branches = stack("branches", -1)
        batch = {
            "input_ids": stack("tokens", self.tokenizer.pad_token_id),
            "labels": stack("labels", IGNORE),
            "position_ids": stack("positions", 0),
            "attention_mask": branch_mask(branches),
        }
        images = [c.image for c in conversations if c.image is not None]
        if images:
            pixels = self.processor.image_processor(images, return_tensors="pt")
            batch["pixel_values"] = pixels["pixel_values"]
        return batch

    def _row(self, conversation: Conversation) -> _Row:
        dialogue = random.Random(conversation.id).random() < self.dialogue_share
        prefix = self._start + (self._image if conversation.image is not None else [])
        row = _Row(
            list(prefix), [IGNORE] * len(prefix), list(range(len(prefix))), [0] * len(prefix)
        )
        room = self.max_text_tokens - len(self._start)
        for number, turn in enumerate(conversation.turns):
            ask = self._ids(turn.question) + self._reply
            if dialogue and number:
                ask = self._next + ask
            answer = self._ids(turn.answer) + [self.tokenizer.eos_token_id]
            tokens = ask + answer
            if len(tokens) > room and number:
                continue
            tokens = tokens[:room]
            start = len(row.tokens) if dialogue else len(prefix)
            row.tokens += tokens
            row.labels += ([IGNORE] * len(ask) + answer)[: len(tokens)]
            row.positions += range(start, start + len(tokens))
            row.branches += [0 if dialogue else number + 1] * len(tokens)
            room -= len(tokens)
        return row

    def _ids(self, text: str, bos: bool = False) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.tokenizer.bos_token_id] * bos + ids


def branch_mask(branches: Tensor) -> Tensor:
    """Boolean mask (B, 1, T, T) of branch numbers (B, T): earlier, and prefix or own branch."""
    key, query = branches[:, None, :], branches[:, :, None]
    causal = torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]
