"""Code that comes with a model - a chat template - run within limits of time and memory.

It runs in a forked process, which holds what its parent holds without loading anything again, and
can be ended whatever it does: no loop, power of numbers or text of 10^12 letters keeps anyone
waiting.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from planner.ir.errors import InputError, first_line

_SECONDS = 5.0
# More than the process has already.
_MORE_BYTES = 1 << 30
_MOST_TEXT = 1 << 20
_DONE, _FAILED = b"+", b"-"


def contained(make: Callable[[], str], what: str, seconds: float = _SECONDS) -> str:
    """What a function of others returns. Where processes cannot be forked it simply runs.

    `what`: it is, for messages: ``the chat template of 'llava'``. InputError where it fails, does
    not end in time, takes a gigabyte more, or returns a million letters.
    """
    if not hasattr(os, "fork"):
        return _judged(*_tried(make), what)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python warns of threads, whose locks the child might wait for: it would be ended in time.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run_and_exit(make, writer)
    os.close(writer)
    try:
        answer = _read(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if answer is None:
        raise InputError(f"{what} does not end within {seconds:g} seconds")
    return _judged(answer[:1], answer[1:], what)


def _run_and_exit(make: Callable[[], str], writer: int) -> None:
    """In the child: write the answer and end, without what a process does at its end."""
    try:
        _limit_memory()
        kind, answer = _tried(make)
        answer = kind + answer
        while answer:
            answer = answer[os.write(writer, answer) :]
    finally:
        os._exit(0)


def _tried(make: Callable[[], str]) -> tuple[bytes, bytes]:
    try:
        return _DONE, make().encode()[: _MOST_TEXT + 1]
    except MemoryError:
        return _FAILED, b"it takes too much memory"
    except BaseException as error:
        return _FAILED, first_line(error)[:200].encode(errors="replace")


def _judged(kind: bytes, answer: bytes, what: str) -> str:
    if kind != _DONE:
        reason = answer.decode(errors="replace") or "it ended its process"
        raise InputError(f"{what} fails: {reason}")
    if len(answer) > _MOST_TEXT:
        raise InputError(f"{what} makes more than {_MOST_TEXT} letters of the prompt")
    return answer.decode()


def _limit_memory() -> None:
    """Where the system says how much the process holds: on Linux."""
    with contextlib.suppress(ImportError, OSError, ValueError, StopIteration):
        import resource

        lines = Path("/proc/self/status").read_text().splitlines()
        held = next(int(line.split()[1]) for line in lines if line.startswith("VmData:")) * 1024
        most = held + _MORE_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _read(reader: int, deadline: float) -> bytes | None:
    """All that is written before the other end closes; None where it does not by the deadline."""
    answer = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reader], [], [], left)[0]:
            break
        part = os.read(reader, 1 << 16)
        if not part:
            return answer
        answer += part
    return None
