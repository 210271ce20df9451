"""The errors that users see: one sentence each."""

from __future__ import annotations


class PlannerError(Exception):
    """Something failed although the input was good (exit code 1)."""

    exit_code = 1


class InputError(PlannerError):
    """The user's input is bad; the message is one clear sentence (exit code 2)."""

    exit_code = 2
