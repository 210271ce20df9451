"""What ``--ray`` does for commands that measure sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import typer

from planner.ir.errors import InputError
from planner.progress import Say
from planner.spread import Here, LoadedT, Spread

Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Spread the work over a Ray cluster: its address, auto for the one that runs here, or "
        "local to start one.",
    ),
]


def check_ray(address: str | None) -> None:
    """InputError where a cluster is asked for and Ray is not installed."""
    if address is not None:
        try:
            import planner.ray_workers  # noqa: F401
        except ModuleNotFoundError as error:
            raise InputError(f"--ray needs {error.name}: pip install 'planner[ray]'") from None


def spread_over(
    address: str | None,
    loaded: LoadedT,
    load: Callable[[], LoadedT],
    items: int,
    progress: Say,
    threads: int = 1,
    place: str = "cpu",
) -> AbstractContextManager[Spread[LoadedT]]:
    """Where so many items are done: here, of what is loaded, or by workers that load the same.

    `threads`, or a GPU where the place is one, are each worker's.
    """
    if address is None:
        return nullcontext(Here(loaded))
    from planner.ray_workers import RayWorkers

    gpus = int(place.startswith("cuda"))
    return RayWorkers(address, load, threads=threads, gpus=gpus, most=items, progress=progress)
