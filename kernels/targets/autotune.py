"""Tiles by measurement, for those who want to wait: what is fastest on the GPU at hand.

The model of `planner.kernels.triton.tiles` proposes a few tiles for each product, a clock decides,
and the user's cache remembers by the GPU's name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from pydantic import TypeAdapter
from torch import Tensor
from triton.testing import do_bench

from planner.files import write_bytes
from planner.ir.errors import InputError
from planner.kernels.targets.keys import SURVIVORS, contents_of
from planner.kernels.targets.plan_launches import Call, Tiles, launches_and_tiles, launches_of
from planner.kernels.triton.launch import Launch, launch
from planner.kernels.triton.tiles import (
    TARGETS,
    Product,
    Target,
    Tile,
    ranked_tiles,
    target_of,
    tiles_chosen_by,
)
from planner.planning.graph_cache import cache_folder
from planner.progress import Say

_FILE = TypeAdapter(list[tuple[Product, Tile]])

_CANDIDATES = 6


def local_target(targets: Mapping[str, Target]) -> str:
    """The one of the targets that the GPU at hand is; InputError where it is none, or there is
    none."""
    if not torch.cuda.is_available():
        raise InputError("--autotune times kernels on a GPU, and there is none here")
    here = target_of(torch.cuda.get_device_capability())
    for name, target in targets.items():
        if target == here:
            return name
    wanted = next(name for name, target in TARGETS.items() if target == here)
    raise InputError(f"--autotune needs --target {wanted}, which is what the GPU here is")


def autotuned(
    calls: Iterable[Call],
    target: Target,
    progress: Say = lambda stage: None,
    *,
    device_name: str | None = None,
    timer: Callable[[Sequence[Launch]], float] | None = None,
) -> Tiles:
    """The fastest tile of every matrix product that some ops ask for.

    Measured tiles are remembered by the GPU's name; the timer gives seconds of some launches, one
    after the other. Both are by default of the GPU at hand.
    """
    device_name = device_name or torch.cuda.get_device_name()
    path = cache_folder() / "tiles" / f"{device_name}, triton {triton.__version__}.json"
    known = _read(path)

    def seconds(call: Call, wanted: Product, tile: Tile) -> float:
        with tiles_chosen_by((known | {wanted: tile}).get):
            return (timer or _timed)([each for _, each in launches_of([call], target)])

    for call in calls:
        for wanted in launches_and_tiles([call], target)[1]:
            if wanted in known:
                continue
            progress(f"timing tiles of {wanted.rows} x {wanted.columns} x {wanted.depth}")
            candidates = ranked_tiles(wanted)[:_CANDIDATES]
            known[wanted] = min(candidates, key=partial(seconds, call, wanted))
            # After every product, so that nobody who interrupts this has waited in vain.
            _write(path, known)
    return known


def on_device(recorded: Launch, device: torch.device | str) -> Launch:
    """A recorded launch on made-up tensors: random numbers, and the survivors that it was for."""
    contents, survivors = contents_of(recorded), recorded.survivors

    def filled(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = torch.zeros(value.shape, dtype=value.dtype, device=device)
        if name in contents:
            made.view(-1)[: len(contents[name])] = torch.tensor(contents[name], dtype=value.dtype)
        return made.normal_() if value.is_floating_point() else made

    arguments = {name: filled(name, value) for name, value in recorded.arguments.items()}
    if survivors is not None:
        tensors = {n: arguments[n] for n in SURVIVORS if arguments.get(n) is not None}
        survivors = replace(survivors, **tensors)
    return replace(recorded, arguments=arguments, survivors=survivors)


def _timed(launches: Sequence[Launch]) -> float:
    """Seconds of launches on the GPU at hand, of the index-driven kernels."""
    return sum(
        1e-3 * float(do_bench(partial(launch, on_device(each, "cuda")))) for each in launches
    )


def _read(path: Path) -> Tiles:
    try:
        return dict(_FILE.validate_json(path.read_bytes()))
    except (OSError, ValueError):
        return {}


def _write(path: Path, tiles: Tiles) -> None:
    with contextlib.suppress(OSError, InputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, _FILE.dump_json([*tiles.items()]))
