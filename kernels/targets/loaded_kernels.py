"""Generated kernels at run time: launches that have one are served by it.

    with load_kernels(Path("build/llava-7b"), "cuda").used() as loaded:
        model.generate(**inputs)
    print(loaded.served, loaded.missed)

Each launch is looked up by its key; one without a generated kernel runs the index-driven one. On
CPU tensors sources are interpreted. On a GPU the folder's machine code is put into Triton's cache,
which launches it where it is what Triton would compile: of the same version, for such arguments.
Otherwise Triton compiles the source. (Not run on a GPU yet; a test compiles against such a cache.)
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import torch
from triton.runtime.jit import JITFunction

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.kernels.targets.compilation import remember
from planner.kernels.targets.keys import Key, key_of
from planner.kernels.targets.manifest import FOLDER, CompiledKernel, Manifest, read_manifest
from planner.kernels.targets.sources import load_function
from planner.kernels.triton.launch import Launch, interpreted_for, loaded, run
from planner.kernels.triton.tiles import (
    TARGETS,
    Product,
    Tile,
    holding,
    target_of,
    tiles_chosen_by,
)
from planner.plan import Plan, plan_digest


class Loaded:
    """Generated kernels of one target.

    Attributes:
        served: launches that a generated kernel ran, by the name of planner's kernel.
        missed: launches for which there is none, likewise.
    """

    def __init__(self, folder: Path, manifest: Manifest, target: str, on_gpu: bool) -> None:
        self.manifest, self.target = manifest, target
        self.served: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self._kernels: dict[Key, GeneratedKernel] = {
            (row.kernel, tuple(row.facts.items())): GeneratedKernel(folder / FOLDER, row, on_gpu)
            for row in manifest.kernels
            if row.target == target
        }
        tiles = (row for row in manifest.tiles if row[0].target == TARGETS[target])
        self._tiles: dict[Product, Tile] = dict(tiles)
        # Launches of a product come again and again.
        self._tile = cache(self._closest_tile)

    def check(self, graph: Graph, plan: Plan | None, dtype: torch.dtype) -> None:
        """Raise InputError unless these are kernels of a model, its plan (None for several) and
        the dtype of its weights."""
        own, runs_in = self.manifest, str(dtype).removeprefix("torch.")
        if own.graph != graph.properties["fingerprint"]:
            raise InputError(f"the kernels are of another model, '{own.model}': compile again")
        if not own.index_driven and (plan is None or own.plan != plan_digest(plan)):
            raise InputError(
                f"the kernels are of another plan, {own.plan}: compile again, or with "
                "--index-driven for any plan"
            )
        if own.dtype != runs_in:
            raise InputError(
                f"the kernels compute in {own.dtype}, and the model is in {runs_in}: run it with "
                f"--dtype {own.dtype}, or compile again with --dtype {runs_in}"
            )

    @contextmanager
    def used(self) -> Iterator[Loaded]:
        """Serve the launches made inside the block, in this thread."""
        target = TARGETS[self.target]
        with interpreted_for(target), tiles_chosen_by(self._tile), holding(loaded, self):
            yield self

    def __call__(self, launch: Launch) -> bool:
        """Run a launch if there is a kernel for it; whether there was."""
        kernel = self.kernel_for(launch)
        if kernel is None:
            self.missed[launch.kernel.name] += 1
            return False
        kernel.run(launch)
        self.served[launch.kernel.name] += 1
        return True

    def kernel_for(self, launch: Launch) -> GeneratedKernel | None:
        """The kernel that serves a launch."""
        return self._kernels.get(key_of(launch, self.manifest.index_driven))

    def _closest_tile(self, wanted: Product) -> Tile | None:
        """The tile of the product of as many rows, or of the closest number that it suits.

        Kernels of any plan were tiled for the survivors of one; these may be others.
        """
        open_ = ("rows", "samples", "columns", "depth") if self.manifest.index_driven else ("rows",)
        sizes = {name: getattr(wanted, name) for name in open_}
        best, least = None, math.inf
        for product, tile in self._tiles.items():
            alike = replace(product, **sizes, target=wanted.target) == wanted
            ratios = (max(getattr(product, name), 1) / max(sizes[name], 1) for name in open_)
            away = sum(abs(math.log2(ratio)) for ratio in ratios)
            if alike and tile.block_m <= wanted.rows and away < least:
                best, least = tile, away
        return best


def load_kernels(folder: Path, device: torch.device | str = "cpu") -> Loaded:
    """Load the kernels that ``planner compile --target`` wrote into a folder, for a device.

    The CPU takes the first target of the folder. Raises InputError: there are none, or none for
    this GPU, or files were changed.
    """
    manifest = read_manifest(folder)
    targets = list(dict.fromkeys(row.target for row in manifest.kernels))
    if not targets:
        raise InputError(f"there are no kernels in '{folder}': the plan leaves nothing to run")
    target, on_gpu = targets[0], torch.device(device).type == "cuda"
    if on_gpu:
        own = target_of(torch.cuda.get_device_capability(device))
        target = f"sm_{own.capability}"
        if target not in targets:
            raise InputError(
                f"there are no kernels for this GPU, {target}, in '{folder}', but for "
                f"{', '.join(targets)}"
            )
    return Loaded(folder, manifest, target, on_gpu)


class GeneratedKernel:
    """One row of a manifest, whose function is loaded when it is first launched."""

    def __init__(self, home: Path, row: CompiledKernel, on_gpu: bool) -> None:
        self.home, self.row, self.on_gpu = home, row, on_gpu

    @cached_property
    def function(self) -> JITFunction:
        """The kernel in the source."""
        row = self.row
        if self.on_gpu:
            metadata = (self.home / row.metadata).read_text(encoding="utf-8")
            cubin = (self.home / row.cubin).read_bytes()
            remember(row.function, json.loads(metadata)["hash"], metadata, cubin)
        return load_function(self.home / row.source, row.function)

    def run(self, launch: Launch) -> None:
        """Run a launch with the parameters that are left."""
        run(self.function, replace(launch, warps=self.row.warps, stages=self.row.stages))
