"""Attempts: where a model leaves a choice, candidates are tried in turn and failures expected."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from planner.ir.errors import InputError

T = TypeVar("T")


class NotLowered(InputError):
    """A model that cannot be lowered, and why."""


def first_success(attempts: Iterable[Callable[[], T]]) -> tuple[T | None, Exception | None]:
    """The result of the first attempt that does not raise, and the first error before it."""
    failure: Exception | None = None
    for attempt in attempts:
        try:
            return attempt(), failure
        except Exception as error:
            failure = failure or error
    return None, failure


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what libraries print and log about failed attempts out of sight."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        logging.disable(previous)


def sentence(error: BaseException | None) -> str:
    """The first line of an error message, short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = ": ".join([type(error).__name__, *lines[:1]])
    return text if len(text) <= 160 else text[:157] + "..."
