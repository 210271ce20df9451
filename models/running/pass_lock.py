"""Who may change a model's modules: one forward pass at a time, in the order of asking.

`threading.RLock` gives a thread that has just let go as good a chance as one that has waited long;
here nobody overtakes. And a pass may be cut short where nothing of planner runs (Ctrl-C between two
layers): its lock is free again as soon as the call that took it is over.
"""

from __future__ import annotations

import threading
from collections import deque
from types import FrameType

# How often those who wait look whether the pass before them was cut short.
LOOK_SECONDS = 0.2


class PassLock:
    """A fair lock, held by a call rather than by a thread."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[threading.Event, int, FrameType | None]] = deque()
        self._thread: int | None = None
        self._call: FrameType | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds it, in a call that still runs."""
        return self._thread == threading.get_ident() and not self._is_over()

    def acquire(self, call: FrameType | None = None) -> None:
        """Wait for one's turn.

        The lock is free when `call` is over, `release` or not; None where that is certain to come.
        """
        mine = threading.get_ident()
        with self._mutex:
            free = self._thread is None or self._is_over()
            if free and not self._waiting:
                self._thread, self._call = mine, call
                return
            turn = threading.Event()
            self._waiting.append((turn, mine, call))
            if free:
                self._hand_over()
        try:
            while not turn.wait(LOOK_SECONDS):
                with self._mutex:
                    if self._is_over():
                        self._hand_over()
        except BaseException:
            with self._mutex:
                if turn.is_set():
                    self._hand_over()
                else:
                    self._waiting = deque(w for w in self._waiting if w[0] is not turn)
            raise

    def release(self) -> None:
        """Let the one that has waited longest go on."""
        with self._mutex:
            self._hand_over()

    def _hand_over(self) -> None:
        self._thread = self._call = None
        if self._waiting:
            turn, self._thread, self._call = self._waiting.popleft()
            turn.set()

    def _is_over(self) -> bool:
        """Whether the call that holds the lock has ended without a word."""
        if self._call is None:
            return False
        try:
            # Python refuses to clear the frame of a call that runs, and only that.
            self._call.clear()
        except RuntimeError:
            return False
        return True
