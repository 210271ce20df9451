"""Tokens of an answer become text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What tokenizers give for bytes that are no letter yet.
_UNFINISHED = "\ufffd"


class AnswerText:
    """The text of one answer, piece by piece; pieces never take a letter back.

    `stops` are texts that end the answer, and are no part of it; `is_stopped`: one has come.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        # The text of the tokens from `_start` on goes on behind that of those up to `_read`: a
        # token's text depends on the one before it, but not on all of them.
        self._start = self._read = 0
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that a token adds, as far as it is certain."""
        self._tokens.append(token)
        before = self._decode(self._start, self._read)
        text = self._decode(self._start, len(self._tokens))
        if len(text) <= len(before) or text.endswith(_UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._certain(text[len(before) :])

    def end(self) -> str:
        """What was held back."""
        before = self._decode(self._start, self._read)
        text = self._decode(self._start, len(self._tokens))[len(before) :]
        return "" if self.is_stopped else self._certain(text) + self._held

    def _certain(self, text: str) -> str:
        """Text without stops, and without an end that may become one."""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        held = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)
        return text
