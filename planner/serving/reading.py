"""Prompts are made ready in threads, while somebody waits for them: what takes long beside what is
soon done.

A request without large pictures never waits for one with them, nor for a server that pictures are
fetched from. Whoever stops waiting is waited for by nobody: between two pictures, or two steps, a
reader looks whether its prompt is still wanted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from planner.loading import image_pixels
from planner.serving.chat_format import Message
from planner.serving.chat_prompts import Prompt, PromptReader, has_remote_pictures
from planner.serving.jobs import Busy, stopping

# Pictures of so many pixels, together, are large: here they took a tenth of a second.
_LARGE = 2_000_000
_FETCHES = 8
# Of the last large prompt, in the pace of large prompts.
_WEIGHT = 0.3
T = TypeVar("T")


@dataclass
class Wait:
    """Somebody's for a prompt."""

    ends: float  # when there is no use for it any more, on the monotonic clock
    late: Busy  # what is said then
    is_over: bool = False

    def check(self) -> None:
        """Raise `late` where nobody waits any more."""
        if self.is_over or time.monotonic() > self.ends:
            raise self.late


class Reading:
    """Threads that read prompts; to be used in one event loop."""

    def __init__(self, reader: PromptReader) -> None:
        self.reader, self._large_reader = reader, reader.another()
        # One each: tokenizers are not for several.
        self._small = ThreadPoolExecutor(1, "planner-prompts")
        self._large = ThreadPoolExecutor(1, "planner-large-prompts")
        self._fetching = ThreadPoolExecutor(_FETCHES, "planner-pictures")
        self._running: set[asyncio.Future[Any]] = set()
        self._has_given_up = False
        self._pixels = 0  # of large prompts that are read, or wait to be
        self._seconds_per_pixel = 0.0

    def start(self) -> None:
        """Have the chat template's process ready."""
        self.reader.template.start()

    def give_up(self) -> None:
        """Tell whoever waits for a prompt, now or later, that the server stops."""
        self._has_given_up = True
        for future in self._running:
            future.cancel()

    def stop(self) -> None:
        """End; what still runs looks first whether it is wanted."""
        for threads in (self._small, self._large, self._fetching):
            threads.shutdown(wait=False, cancel_futures=True)
        self.reader.template.stop()

    async def prompt(self, messages: Sequence[Message], wait: Wait) -> Prompt:
        """The prompt of some messages; InputError as of `PromptReader.read`.

        Busy where nobody would wait for it any more by the time that it is ready, and where what
        waits takes longer.
        """
        try:
            threads = self._fetching if has_remote_pictures(messages) else self._small
            files = await self._in(threads, wait, self.reader.files, messages, wait.check)
            pixels = sum(map(image_pixels, files))
            if pixels <= _LARGE:
                return await self._in(
                    self._small, wait, self.reader.read, messages, files, wait.check
                )
            return await self._large_prompt(pixels, wait, messages, files)
        finally:
            wait.is_over = True

    async def _large_prompt(
        self, pixels: int, wait: Wait, messages: Sequence[Message], files: Sequence[bytes]
    ) -> Prompt:
        behind = self._pixels * self._seconds_per_pixel
        needed = behind + pixels * self._seconds_per_pixel
        # Where nothing waits it is tried: the pace may be that of a moment.
        if self._pixels and time.monotonic() + needed > wait.ends:
            raise Busy("too many large images are waiting", "queue", behind)

        def timed() -> Prompt:
            begun = time.monotonic()
            prompt = self._large_reader.read(messages, files, wait.check)
            pace, known = (time.monotonic() - begun) / pixels, self._seconds_per_pixel
            self._seconds_per_pixel = _WEIGHT * pace + (1 - _WEIGHT) * (known or pace)
            return prompt

        self._pixels += pixels
        try:
            return await self._in(self._large, wait, timed)
        finally:
            self._pixels -= pixels

    async def _in(
        self, threads: Executor, wait: Wait, function: Callable[..., T], *arguments: Any
    ) -> T:
        """What a function returns, in a thread; it is not begun where nobody waits by then."""
        if self._has_given_up:
            raise stopping()
        future = asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
        self._running.add(future)
        try:
            return await asyncio.wait_for(future, wait.ends - time.monotonic())
        except TimeoutError:
            raise wait.late from None
        except asyncio.CancelledError:
            if self._has_given_up:
                raise stopping() from None
            raise
        finally:
            self._running.discard(future)
