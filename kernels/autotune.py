"""Tiles by measurement, for those who want to wait: what is fastest on the GPU at hand.

Enters: the blocks of a plan, and a GPU. Leaves: a tile per matrix product, remembered in the user's
cache by the GPU's name. The model of `planner.kernels.tiles` proposes a few tiles for each product;
they differ little in predicted time, and the clock decides. Nothing here runs unless asked for.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from planner.files import write_text
from planner.ir.errors import InputError
from planner.kernels.codegen import Source
from planner.kernels.shapes import Block
from planner.kernels.tiles import (
    TARGETS,
    Product,
    Target,
    Tile,
    ranked_tiles,
    target_of,
    tiles_chosen_by,
)
from planner.kernels.trial import load_source, trial
from planner.planning.graph_cache import cache_folder

__all__ = ["Tiles", "autotuned", "local_target", "timed"]

Tiles = dict[Product, Tile]

_CANDIDATES = 6


def local_target(targets: Mapping[str, Target]) -> str:
    """The one of the targets that the GPU at hand is.

    Raises:
        InputError: there is no GPU, or it is none of them.
    """
    if not torch.cuda.is_available():
        raise InputError("--autotune times kernels on a GPU, and there is none here")
    here = target_of(torch.cuda.get_device_capability())
    for name, target in targets.items():
        if target == here:
            return name
    wanted = next(name for name, target in TARGETS.items() if target == here)
    raise InputError(f"--autotune needs --target {wanted}, which is what the GPU here is")


def autotuned(
    blocks: Iterable[Block],
    write: Callable[[Block], Source],
    device_name: str,
    progress: Callable[[str], None] = lambda stage: None,
    timer: Callable[[Source], float] | None = None,
) -> Tiles:
    """The fastest tile of every matrix product in some blocks.

    Args:
        blocks: from `planner.kernels.shapes.blocks_of`.
        write: makes the source of one, for the GPU's target.
        device_name: the GPU's, which measured tiles are remembered by.
        progress: told what is being done.
        timer: seconds of a source's kernels; `timed` by default.
    """
    path = cache_folder() / "tiles" / f"{device_name}, triton {triton.__version__}.json"
    known = _read(path)

    def seconds(block: Block, wanted: Product, tile: Tile) -> float:
        with tiles_chosen_by((known | {wanted: tile}).get):
            return (timer or timed)(write(block))

    for block in blocks:
        for wanted in _products(block, write):
            if wanted in known:
                continue
            progress(f"timing tiles of {wanted.rows} x {wanted.columns} x {wanted.depth}")
            candidates = ranked_tiles(wanted)[:_CANDIDATES]
            known[wanted] = min(candidates, key=partial(seconds, block, wanted))
            # After every product, so that nobody who interrupts this has waited in vain.
            _write(path, known)
    return known


def timed(source: Source) -> float:
    """Seconds of a source's kernels on the GPU at hand, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        module = load_source(source, Path(folder))
        kernels = [trial(module, kernel, torch.device("cuda")) for kernel in source.kernels]
        return sum(1e-3 * float(do_bench(kernel)) for kernel in kernels)


def _products(block: Block, write: Callable[[Block], Source]) -> list[Product]:
    """The products that a block asks tiles for."""
    asked: list[Product] = []

    def note(wanted: Product) -> None:
        asked.append(wanted)

    with tiles_chosen_by(note):
        write(block)
    return asked


def _read(path: Path) -> Tiles:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            Product(**product | {"target": TARGETS[product["target"]]}): Tile(**tile)
            for product, tile in entries
        }
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _write(path: Path, tiles: Tiles) -> None:
    names = {target: name for name, target in TARGETS.items()}
    entries = [
        [asdict(wanted) | {"target": names[wanted.target]}, asdict(tile)]
        for wanted, tile in tiles.items()
    ]
    with contextlib.suppress(OSError, InputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(entries))
