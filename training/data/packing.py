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
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from planner.ir.errors import InputError
from planner.training.data.conversations import Conversation
from planner.training.data.questions import Turn

IGNORE = -100  # label of positions that are not trained on, as in transformers


@dataclass
class _Row:
    most: int  # tokens; what comes behind them is left out
    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)  # 0 is the prefix, seen by all

    def add(self, asked: list[int], answer: list[int], start: int, branch: int = 0) -> None:
        """Append what is not trained on and what is, at positions from `start` on."""
        room = self.most - len(self.tokens)
        tokens = (asked + answer)[:room]
        self.tokens += tokens
        self.labels += ([IGNORE] * len(asked) + answer)[:room]
        self.positions += range(start, start + len(tokens))
        self.branches += [branch] * len(tokens)


class Packer:
    """Data collator: conversations in a processor's chat template to a batch for a LLaVA model.

    Token ids are those that the model is asked with: in front of an answer stands what the
    processor makes of the chat template there, whatever the tokenizer. The loss is on answers and
    what ends them; where the template ends none, the last one gets an end token. Turns that would
    pass `max_text_tokens` (tokens besides the image) are left out; a conversation whose first turn
    alone is longer is cut there.

    The batch, for B conversations padded to T tokens: `input_ids`, `labels`, `position_ids` (B, T),
    `attention_mask` (B, 1, T, T) boolean, `pixel_values` (images, 3, height, width) when there are
    images. Raises InputError: the processor has no chat template, one that rewrites earlier turns,
    or one that takes all of `max_text_tokens` itself; or it cuts pictures into tiles, or else gives
    them tokens by their size.
    """

    def __init__(self, processor: Any, max_text_tokens: int, dialogue_share: float = 0.0):
        if not processor.chat_template:
            raise InputError("the model's processor has no chat template: set prompt=llava-v1")
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_text_tokens, self.dialogue_share = max_text_tokens, dialogue_share
        image_tokens = self._image_tokens()
        self._image = [processor.image_token_id] * image_tokens
        # With a question of no words, by whether there is an image.
        self._asked = {
            has_image: self._ids(self._text([Turn("", "")], has_image, asks=True))
            for has_image in (False, True)
        }
        own = len(self._asked[True]) - image_tokens
        if own >= max_text_tokens:
            raise InputError(
                f"max_text_tokens={max_text_tokens} is less than a prompt without words: {own}"
            )

    def _image_tokens(self) -> int:
        """That a picture takes; InputError where not all take equally many, and nothing besides."""
        processor = self.processor
        alone = self.tokenizer(processor.image_token)["input_ids"]
        counts = set()
        for size in ((8, 8), (9, 90)):
            made = dict(processor(images=Image.new("RGB", size), text=processor.image_token))
            (ids,) = made.pop("input_ids")
            counts.add(1 + len(ids) - len(alone))
            given = {*made} - {"attention_mask"}
            if len(counts) > 1 or {*ids} != {*alone} or given != {"pixel_values"}:
                raise InputError(
                    f"training packs pictures that all take equally many tokens, as LLaVA-1.5's, "
                    f"and those of {type(processor).__name__} do not"
                )
        return counts.pop()

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
        has_image = conversation.image is not None
        row = _Row(self.max_text_tokens + len(self._image) * has_image)
        if random.Random(conversation.id).random() < self.dialogue_share:
            self._dialogue(row, conversation.turns, has_image)
        else:
            self._branches(row, conversation.turns, has_image)
        return row

    def _dialogue(self, row: _Row, turns: Sequence[Turn], has_image: bool) -> None:
        kept: list[Turn] = []
        for turn in turns:
            asked, answer = self._turn(kept, turn, has_image, row.tokens)
            if not kept or len(row.tokens) + len(asked + answer) <= row.most:
                row.add(asked, answer, len(row.tokens))
                kept.append(turn)
        row.add([], self._end(row.tokens), len(row.tokens))

    def _branches(self, row: _Row, turns: Sequence[Turn], has_image: bool) -> None:
        pairs = [self._turn([], turn, has_image, []) for turn in turns]
        # What all begin with; a tokenizer may merge the last of it with a question.
        shared = min(_agreement(self._asked[has_image], asked) for asked, _ in pairs)
        row.add(self._asked[has_image][:shared], [], 0)
        for number, (asked, answer) in enumerate(pairs):
            asked, answer = asked[shared:], answer + self._end(answer)
            if not number or len(row.tokens) + len(asked + answer) <= row.most:
                row.add(asked, answer, shared, number + 1)

    def _turn(
        self, before: Sequence[Turn], turn: Turn, has_image: bool, known: list[int]
    ) -> tuple[list[int], list[int]]:
        """Tokens of (what is asked, what is answered) behind those `known` of the turns before."""
        past = self._text(before, has_image) if before else ""
        prompt = self._text([*before, turn], has_image, asks=True)
        whole = self._text([*before, turn], has_image)
        asked = self._behind(known, past, prompt)
        return asked, self._behind(known + asked, prompt, whole)

    def _text(self, turns: Sequence[Turn], has_image: bool, asks: bool = False) -> str:
        """The turns by the chat template, up to where the last answer begins if it `asks`."""
        messages: list[dict[str, Any]] = []
        for turn in turns:
            for role, text in (("user", turn.question), ("assistant", turn.answer)):
                messages.append({"role": role, "content": [{"type": "text", "text": text}]})
        if has_image:
            messages[0]["content"].insert(0, {"type": "image"})
        made: str = self.processor.apply_chat_template(
            messages[: len(messages) - asks], add_generation_prompt=asks, tokenize=False
        )
        # Of what stands between an answer and the next question, blanks belong to neither.
        return made if asks else made.rstrip()

    def _behind(self, known: list[int], past: str, text: str) -> list[int]:
        """Tokens of a text behind those of its beginning, `past`.

        Where the tokenizer merges the two, those of what is behind by itself: a model is asked with
        what it knows, and goes on from there.
        """
        ids = self._ids(text)
        if ids[: len(known)] == known:
            return ids[len(known) :]
        if not text.startswith(past):
            raise InputError("the chat template rewrites what was said before: train single turns")
        return self._ids(text[len(past) :], add_special_tokens=False)

    def _ids(self, text: str, **options: Any) -> list[int]:
        ids: list[int] = self.tokenizer(text, **options)["input_ids"]
        image = self.processor.image_token_id
        return [token for id_ in ids for token in (self._image if id_ == image else [id_])]

    def _end(self, tokens: list[int]) -> list[int]:
        """The end token, where tokens do not end in it."""
        end = self.tokenizer.eos_token_id
        return [] if end is None or tokens[-1:] == [end] else [end]


def _agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def branch_mask(branches: Tensor) -> Tensor:
    """Boolean mask (B, 1, T, T) of branch numbers (B, T): earlier, and prefix or own branch."""
    key, query = branches[:, None, :], branches[:, :, None]
    causal = torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]
