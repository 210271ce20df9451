"""Work spread over a Ray cluster, with the results of one process.

An item is done whole by one worker, and what it was sent with is all that it depends on. So it does
not matter which worker that is, nor whether it was begun before on one that is gone.
"""

from __future__ import annotations

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Generic, Self

import ray
from ray._private import services
from ray.exceptions import RayError, RayTaskError

from planner.ir.errors import InputError, PlannerError, first_line
from planner.progress import Say
from planner.spread import ItemT, LoadedT, Make, ResultT

# Bytes of a cluster that is started here; what goes over it is text, pictures and plans.
_STORE_BYTES = 256 * 2**20
# Seconds in which a cluster answers.
_ANSWERS = 5.0
# Workers that may be lost at the same item, which then is taken for what ends them.
_MOST_LOST = 3


def connect(address: str) -> None:
    """To the cluster at an address, or to one that is started: ``local``.

    InputError where there is none.
    """
    # Ray reports what it is used for, unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    given: dict[str, Any] = own if address == "local" else {}
    try:
        known = None if "://" in address else services.canonicalize_bootstrap_address(address)
        if known is not None:
            # Where nobody listens, Ray would try for a quarter of an hour.
            host, _, port = known.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _ANSWERS).close()
        ray.init(
            address, log_to_driver=False, logging_level="error", ignore_reinit_error=True, **given
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"there is no Ray cluster at '{address}': {first_line(error)}") from None


def enter(folder: str) -> None:
    """Have paths of this process be relative to the same folder as the command's, if it is here."""
    with suppress(OSError):
        os.chdir(folder)


class _Worker(Generic[LoadedT]):
    """What runs on the cluster."""

    def __init__(self, folder: str, threads: int) -> None:
        enter(folder)
        # Read by libraries that are not imported yet. By other numbers of threads sums are rounded
        # otherwise.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._made = -1

    def load(self, load: Callable[[], LoadedT]) -> None:
        self._loaded = load()

    def work(self, number: int, make: list[Any], item: Any) -> Any:
        if self._made != number:
            self._work = ray.get(make[0])(self._loaded)
            self._made = number
        return self._work(item)


class RayWorkers(Generic[LoadedT]):
    """Workers on a cluster, for a block, at whose end they are gone.

    Args:
        address: see `connect`.
        load: makes in each what it works with.
        threads: each worker computes with; it has as many CPUs.
        gpus: each worker has.
        most: so many workers are useful.
        progress: told what is being done.

    Raises InputError: there is no cluster, or no room on it. What a worker raises is raised here,
    errors other than planner's as PlannerError.
    """

    def __init__(
        self,
        address: str,
        load: Callable[[], LoadedT],
        *,
        threads: int = 1,
        gpus: int = 0,
        most: int,
        progress: Say = lambda stage: None,
    ) -> None:
        self._address, self._load = address, load
        self._threads, self._gpus = threads, gpus
        self._most, self._progress = most, progress
        self._idle: list[Any] = []
        # What is awaited: the worker, and the number of its item; None where that is not wanted.
        self._busy: dict[Any, tuple[Any, int | None]] = {}
        self._lost: Counter[int | None] = Counter()
        self._left: deque[int] = deque()
        self._rounds = 0

    def __enter__(self) -> Self:
        self._progress("find the Ray cluster")
        connect(self._address)
        try:
            count = min(self._most, self._room())
            self._progress(f"wait for the first of {count} workers")
            for _ in range(count):
                self._start()
            while not self._idle:
                self._next()
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Workers end with it, and so does a cluster that was started here.
        ray.shutdown()

    def __call__(
        self, make: Make[LoadedT, ItemT, ResultT], items: Sequence[ItemT]
    ) -> Iterator[tuple[int, ResultT]]:
        """See `planner.spread.Spread`."""
        made = [ray.put(make)]
        self._rounds += 1
        self._busy = {done: (worker, None) for done, (worker, _) in self._busy.items()}
        self._lost.clear()
        self._left = deque(range(len(items)))
        missing = len(items)
        while missing:
            while self._left and self._idle:
                worker, index = self._idle.pop(), self._left.popleft()
                done = worker.work.remote(self._rounds, made, items[index])
                self._busy[done] = worker, index
            found = self._next()
            if found is not None:
                missing -= 1
                yield found

    def _room(self) -> int:
        """For how many workers the cluster has room."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if self._gpus:
            count = sum(int(node.get("GPU", 0)) // self._gpus for node in nodes)
            self._threads = 1
        else:
            largest = max(int(node.get("CPU", 0)) for node in nodes)
            self._threads = max(1, min(self._threads, largest))
            count = sum(int(node.get("CPU", 0)) // self._threads for node in nodes)
        if not count:
            kind = "GPU" if self._gpus else "CPU"
            raise InputError(f"the Ray cluster at '{self._address}' has no {kind}")
        return count

    def _start(self) -> None:
        options = {"num_cpus": self._threads, "num_gpus": self._gpus}
        actor: Any = ray.remote(_Worker).options(**options)
        worker = actor.remote(os.getcwd(), self._threads)
        self._busy[worker.load.remote(self._load)] = worker, None

    def _next(self) -> tuple[int, Any] | None:
        """Wait for a worker: the number of the item that it has done, and what came of it.

        None where it has only loaded, and where it is lost: then another one starts, and the item
        is left to whoever is next.
        """
        (done,), _ = ray.wait(list(self._busy), num_returns=1)
        worker, index = self._busy.pop(done)
        try:
            result = ray.get(done)
        except RayTaskError as error:
            self._idle.append(worker)
            cause = error.cause
            if isinstance(cause, PlannerError):
                raise cause from None
            kind = type(cause).__name__
            raise PlannerError(f"a worker failed: {kind}: {first_line(cause)}") from None
        except RayError as error:
            self._note_loss(index, error)
            self._start()
            return None
        self._lost.pop(index, None)
        self._idle.append(worker)
        return None if index is None else (index, result)

    def _note_loss(self, index: int | None, error: RayError) -> None:
        self._lost[index] += 1
        if self._lost[index] >= _MOST_LOST:
            when = "while they loaded" if index is None else "at the same work"
            raise PlannerError(
                f"{_MOST_LOST} workers were lost {when}, the last one so: {first_line(error)}"
            ) from None
        if index is not None:
            self._left.appendleft(index)
