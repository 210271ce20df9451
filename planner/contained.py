"""Code that comes with a model - a chat template - run within limits of time and memory.

It runs in a forked process, which holds what its parent holds without loading anything again, and
can be ended whatever it does: no loop, power of numbers or text of 10^12 letters keeps anyone
waiting. `contained` starts a process for one call, a `Container` keeps one for many.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import threading
import time
import warnings
import weakref
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
    child = _fork()
    if child == 0:
        _run_and_exit(make, writer)
    os.close(writer)
    try:
        answer = _read(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        _kill(child)
    if answer is None:
        raise InputError(f"{what} does not end within {seconds:g} seconds")
    return _judged(answer[:1], answer[1:], what)


class Container:
    """A function of others, from one text to another, in a process that stays between calls.

    A call takes a tenth of a millisecond, where a process as large as a model is forked in a tenth
    of a second; each has the limits of `contained`, whose InputErrors it raises. A process that
    exceeds them is ended, and the next call starts one. Several threads may call: one at a time is
    served.

    Args:
        make: the function; what it keeps from one call to the next is its own.
        what: it is, for messages.
        seconds: that a call may take.
        most_text: bytes that it may return.
    """

    def __init__(
        self,
        make: Callable[[str], str],
        what: str,
        seconds: float = _SECONDS,
        most_text: int = _MOST_TEXT,
    ) -> None:
        self._make, self._what, self._seconds, self._most = make, what, seconds, most_text
        self._lock = threading.Lock()
        self._link: socket.socket | None = None
        self._end: Callable[[], object] = lambda: None

    def __call__(self, text: str) -> str:
        """What the function makes of a text."""
        if not hasattr(os, "fork"):
            return _judged(*_tried(lambda: self._make(text), self._most), self._what, self._most)
        with self._lock:
            deadline = time.monotonic() + self._seconds
            try:
                link = self._started()
                _send(link, text.encode(errors="surrogatepass"), deadline)
                answer = _receive(link, deadline)
            except TimeoutError:
                self._stop()
                raise InputError(
                    f"{self._what} does not end within {self._seconds:g} seconds"
                ) from None
            except OSError:
                answer = None
            if answer is None:
                self._stop()
        answer = answer or b""
        return _judged(answer[:1], answer[1:], self._what, self._most)

    def start(self) -> None:
        """Have the process there before the first call."""
        if hasattr(os, "fork"):
            with self._lock:
                self._started()

    def stop(self) -> None:
        """End the process, which holds what its parent held when it was forked; a call starts
        another."""
        with self._lock:
            self._stop()

    def _started(self) -> socket.socket:
        if self._link is not None and _is_gone(self._link):
            self._stop()
        if self._link is None:
            self._link, theirs = socket.socketpair()
            child = _fork()
            if child == 0:
                _answer_calls(self._make, theirs, self._seconds, self._most)
            theirs.close()
            self._end = weakref.finalize(self, _end, self._link, child, os.getpid())
        return self._link

    def _stop(self) -> None:
        self._end()
        self._link = None


def _fork() -> int:
    with warnings.catch_warnings():
        # Python warns of threads, whose locks the child might wait for: it would be ended in time.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _is_gone(link: socket.socket) -> bool:
    """Whether the other end is, which says nothing unless it is asked."""
    link.settimeout(0)
    try:
        return not link.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _end(link: socket.socket, child: int, owner: int) -> None:
    # A copy of the owner, forked by somebody else, has no say.
    if os.getpid() == owner:
        link.close()
        _kill(child)


def _answer_calls(
    make: Callable[[str], str], link: socket.socket, seconds: float, most_text: int
) -> None:
    """In the child: answer calls until the parent is gone."""
    try:
        # Its parent's connections would stay open with it.
        os.closerange(3, link.fileno())
        os.closerange(link.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        gc.freeze()
        _limit_memory()
        while (text := _receive(link)) is not None:
            # Where the parent is killed meanwhile.
            signal.setitimer(signal.ITIMER_REAL, seconds + 1)
            kind, answer = _tried(lambda: make(text.decode(errors="surrogatepass")), most_text)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(link, kind + answer)
    finally:
        os._exit(0)


def _send(link: socket.socket, contents: bytes, deadline: float | None = None) -> None:
    """Raise TimeoutError where the other end does not take them in time."""
    link.settimeout(None if deadline is None else max(1e-3, deadline - time.monotonic()))
    link.sendall(len(contents).to_bytes(8, "big") + contents)


def _receive(link: socket.socket, deadline: float | None = None) -> bytes | None:
    """What the other end sent; None where it is gone, TimeoutError where nothing comes in time."""
    answer, missing = b"", 8
    while len(answer) < missing:
        link.settimeout(None if deadline is None else max(1e-3, deadline - time.monotonic()))
        part = link.recv(1 << 20)
        if not part:
            return None
        answer += part
        if missing == 8 and len(answer) >= 8:
            missing += int.from_bytes(answer[:8], "big")
    return answer[8:]


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


def _tried(make: Callable[[], str], most_text: int = _MOST_TEXT) -> tuple[bytes, bytes]:
    try:
        return _DONE, make().encode()[: most_text + 1]
    except MemoryError:
        return _FAILED, b"it takes too much memory"
    except BaseException as error:
        return _FAILED, first_line(error)[:200].encode(errors="replace")


def _judged(kind: bytes, answer: bytes, what: str, most_text: int = _MOST_TEXT) -> str:
    if kind != _DONE:
        reason = answer.decode(errors="replace") or "it ended its process"
        raise InputError(f"{what} fails: {reason}")
    if len(answer) > most_text:
        raise InputError(f"{what} makes more than {most_text} letters of the prompt")
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
    with selectors.DefaultSelector() as waiting:
        waiting.register(reader, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0 and waiting.select(left):
            part = os.read(reader, 1 << 16)
            if not part:
                return answer
            answer += part
    return None
