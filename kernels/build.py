"""A plan's kernels as files: sources, machine code, and the manifest of both.

Enters: a Graph, a Plan, and targets. Leaves: the contents of ``kernels/``, ready to be written.
Machine code is cached by the text of a kernel and everything it is compiled for; a second plan
that shares kernels, or a second run, compiles only what is new.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
import triton
from triton.runtime.jit import JITFunction

from planner import __version__
from planner.files import write_text
from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.intervals import print_ranges
from planner.kernels.aot import Compiled, compile_kernel, specialization
from planner.kernels.autotune import Tiles, autotuned, local_target
from planner.kernels.codegen import Generated, Origin, Source, generate
from planner.kernels.manifest import NAME, CompiledKernel, Manifest
from planner.kernels.shapes import Block, blocks_of
from planner.kernels.tiles import Target, tiles_chosen_by
from planner.kernels.trial import load_source
from planner.plan import Plan, plan_digest
from planner.planning.graph_cache import cache_folder

__all__ = ["build_kernels"]

Progress = Callable[[str], None]


def build_kernels(
    graph: Graph,
    plan: Plan,
    workload: Workload,
    targets: Mapping[str, Target],
    *,
    index_driven: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    autotune: bool = False,
    progress: Progress = lambda stage: None,
) -> tuple[Manifest, dict[str, bytes]]:
    """Generate and compile the kernels of a plan.

    Args:
        graph: of the base model.
        plan: made for it.
        workload: whose token counts tiles are chosen for.
        targets: by name.
        index_driven: survivors as data, for plans that change with the input.
        dtype: of activations and weights.
        autotune: time tiles on the GPU at hand, for its target.
        progress: told what is being done.

    Returns:
        The manifest, and every file of the folder by path, the manifest's among them.

    Raises:
        InputError: the plan does not fit the graph, no tile fits a target, or there is no GPU to
            time tiles on.
    """
    tuned = local_target(targets) if autotune else None
    blocks, left_out = blocks_of(graph, plan, workload)
    origin = Origin(graph.name, plan_digest(plan), __version__)
    files: dict[str, bytes] = {}
    rows: list[CompiledKernel] = []
    for name, target in targets.items():
        write = partial(
            generate, target=target, origin=origin, dtype=dtype, index_driven=index_driven
        )
        tiles = _measured(blocks, write, progress) if name == tuned else {}
        with tiles_chosen_by(tiles.get):
            sources = write(blocks)
        compiled = _compile_all(sources, name, target, progress)
        for source in sources:
            path = f"{name}/{source.name}.py"
            files[path] = source.text.encode()
            for kernel in source.kernels:
                made = compiled[source.name, kernel.name]
                row = _row(source, kernel, made, path)
                files[row.cubin] = made.cubin
                rows.append(row)
    manifest = Manifest(
        model=graph.name,
        plan=origin.plan,
        index_driven=index_driven,
        dtype=str(dtype).removeprefix("torch."),
        versions={
            "planner": __version__,
            "triton": triton.__version__,
            "torch": torch.__version__,
        },
        kernels=rows,
        left_out=left_out,
    )
    files[NAME] = manifest.dump().encode()
    return manifest, files


def _measured(
    blocks: Sequence[Block], write: Callable[[Sequence[Block]], list[Source]], progress: Progress
) -> Tiles:
    """Tiles that the GPU at hand is fastest with."""
    return autotuned(
        blocks, lambda block: write([block])[0], torch.cuda.get_device_name(), progress
    )


def _row(source: Source, kernel: Generated, made: Compiled, path: str) -> CompiledKernel:
    block = source.block
    return CompiledKernel(
        kernel=kernel.name,
        target=made.target,
        source=path,
        cubin=f"{path.removesuffix('.py')}.{kernel.name}.cubin",
        cubin_sha256=sha256(made.cubin).hexdigest(),
        block=block.shape.title,
        phase=block.phase,
        layers=print_ranges(block.layers),
        batch=block.batch,
        tokens=block.tokens,
        registers=made.registers,
        spill_bytes=made.spill_bytes,
        shared_bytes=made.shared_bytes,
        mma=made.tensor_core["mma"],
        wgmma=made.tensor_core["wgmma"],
        warps=kernel.warps,
        stages=kernel.stages,
        tile=dict(kernel.tile),
        predicted_us=round(kernel.seconds * 1e6, 3),
    )


# -- compiling ------------------------------------------------------------------------------------


def _compile_all(
    sources: Sequence[Source], name: str, target: Target, progress: Progress
) -> dict[tuple[str, str], Compiled]:
    """(source, kernel) -> machine code, on all cores."""
    with tempfile.TemporaryDirectory(prefix="planner-kernels-") as folder:
        modules = {source.name: load_source(source, Path(folder)) for source in sources}
        wanted: dict[str, list[tuple[str, str]]] = {}
        work: dict[str, tuple[JITFunction, Generated]] = {}
        for source in sources:
            for kernel in source.kernels:
                function = getattr(modules[source.name], kernel.name)
                key = _key(function, kernel, target)
                wanted.setdefault(key, []).append((source.name, kernel.name))
                work[key] = (function, kernel)
        done = 0
        compiled: dict[tuple[str, str], Compiled] = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for key, made in zip(
                work, pool.map(lambda key: _cached(key, *work[key], target), work), strict=True
            ):
                done += 1
                progress(f"{name}: {done} of {len(work)} kernels compiled")
                compiled |= dict.fromkeys(wanted[key], made)
    return compiled


def _key(function: JITFunction, kernel: Generated, target: Target) -> str:
    """What machine code depends on."""
    facts = [
        _closure(function),
        repr(specialization(function, kernel.arguments)),
        (target.capability, kernel.warps, kernel.stages),
        (triton.__version__, __version__),
    ]
    return sha256(repr(facts).encode()).hexdigest()[:32]


def _closure(function: JITFunction) -> list[str]:
    """Texts of a kernel and of the device functions that it calls."""
    found: dict[str, str] = {}
    pending = [function]
    while pending:
        one = pending.pop()
        found[one.fn.__name__] = one.src
        for name in sorted(set(re.findall(r"\w+", one.src)) - set(found)):
            other = one.fn.__globals__.get(name)
            if isinstance(other, JITFunction):
                pending.append(other)
    return [found[name] for name in sorted(found)]


def _cached(key: str, function: JITFunction, kernel: Generated, target: Target) -> Compiled:
    path = cache_folder() / "kernels" / f"{key}.json"
    found = _read(path)
    if found is not None:
        return found
    made = compile_kernel(
        function, kernel.arguments, target, warps=kernel.warps, stages=kernel.stages
    )
    facts = {
        "name": made.name,
        "target": made.target,
        "registers": made.registers,
        "spill_bytes": made.spill_bytes,
        "shared_bytes": made.shared_bytes,
        "tensor_core": dict(made.tensor_core),
        "warps": made.warps,
        "ptx": made.ptx,
    }
    entry = facts | {
        "cubin": base64.b64encode(made.cubin).decode(),
        "digest": sha256(made.cubin).hexdigest(),
    }
    # A cache that cannot be written costs time, nothing else.
    with contextlib.suppress(OSError, InputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(entry))
    return made


def _read(path: Path) -> Compiled | None:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        cubin = base64.b64decode(entry.pop("cubin"))
        if sha256(cubin).hexdigest() != entry.pop("digest"):
            return None
        return Compiled(**entry, cubin=cubin)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError):
        return None
