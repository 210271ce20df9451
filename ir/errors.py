"""The errors that users see: one sentence each."""

from __future__ import annotations

from collections.abc import Iterable

# What a user typed, a file held or a library said may be in a sentence.
_LONGEST = 800


def one_sentence(text: str, longest: int = _LONGEST) -> str:
    """A text on one line, printable, and not too long: its middle is left out."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


class PlannerError(Exception):
    """Something failed although the input was good (exit code 1)."""

    exit_code = 1

    def __init__(self, sentence: str) -> None:
        super().__init__(one_sentence(sentence))


class InputError(PlannerError):
    """The user's input is bad; the message is one clear sentence (exit code 2)."""

    exit_code = 2


def check_known(what: str, name: object, known: Iterable[object]) -> None:
    """Raise InputError, which lists the known names, where a name is none of them."""
    known = list(known)
    if name not in known:
        raise InputError(f"unknown {what} '{name!s:.80}': choose from {', '.join(map(str, known))}")


def first_line(error: BaseException) -> str:
    """What a library's error says first, or its type where it says nothing.

    A line that ends in a colon announces the next one.
    """
    said = ""
    for line in str(error).split("\n"):
        said = f"{said} {line.strip()}".strip()
        if said and not said.endswith(":"):
            break
    return said or type(error).__name__
