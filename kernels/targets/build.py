"""A plan's kernels as files: sources, machine code, and the manifest of both."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
import triton

from planner import __version__
from planner.ir.cost import Workload
from planner.ir.graph import Graph
from planner.kernels.targets.autotune import autotuned, local_target
from planner.kernels.targets.compilation import Compiled, compile_kernel, compiling_for
from planner.kernels.targets.keys import facts_of
from planner.kernels.targets.manifest import NAME, CompiledKernel, Manifest
from planner.kernels.targets.plan_launches import Tiles, calls_of, launches_and_tiles
from planner.kernels.targets.sources import Source, load_function, sources_of
from planner.kernels.triton.tiles import Target
from planner.plan import Plan, plan_digest
from planner.progress import Say


def build_kernels(
    graph: Graph,
    plan: Plan,
    workload: Workload,
    targets: Mapping[str, Target],
    *,
    dtype: torch.dtype,
    index_driven: bool = False,
    autotune: bool = False,
    progress: Say = lambda stage: None,
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of a plan's kernels, and every file of their folder by path, itself among them.

    Args:
        graph: of the base model that the plan is made for.
        workload: whose token counts tiles are chosen for.
        index_driven: survivors as data, for plans that change with the input.
        autotune: time tiles on the GPU at hand, for its target.

    Raises InputError: the plan does not fit the graph, no tile fits a target, or there is no GPU to
    time tiles on.
    """
    tuned = local_target(targets) if autotune else None
    calls, left_out = calls_of(graph, plan, workload, dtype, any_plan=index_driven)
    digest = plan_digest(plan)
    origin = f"Model {graph.name}, {'any plan' if index_driven else f'plan {digest}'}"
    files: dict[str, bytes] = {}
    rows: list[CompiledKernel] = []
    tiles: Tiles = {}
    for name, target in targets.items():
        measured = autotuned(calls, target, progress) if name == tuned else {}
        launches, asked = launches_and_tiles(calls, target, measured)
        tiles |= asked
        sources = sources_of(launches, any_plan=index_driven)
        texts = [source.text(name, origin) for source in sources]
        compiled = _compiled(sources, texts, target, partial(_report, progress, name))
        for source, text, made in zip(sources, texts, compiled, strict=True):
            row = _row(source, made, name, target, index_driven)
            files |= {row.source: text.encode(), row.metadata: made.metadata.encode()}
            files[row.cubin] = made.cubin
            rows.append(row)
    versions = {"planner": __version__, "triton": triton.__version__, "torch": torch.__version__}
    manifest = Manifest(
        model=graph.name,
        graph=str(graph.properties["fingerprint"]),
        plan=digest,
        index_driven=index_driven,
        dtype=str(dtype).removeprefix("torch."),
        versions=versions,
        files={path: sha256(contents).hexdigest() for path, contents in files.items()},
        tiles=[*tiles.items()],
        kernels=rows,
        left_out=left_out,
    )
    files[NAME] = manifest.dump().encode()
    return manifest, files


def _report(progress: Say, name: str, stage: str) -> None:
    progress(f"{name}: {stage}")


def _row(
    source: Source, made: Compiled, name: str, target: Target, index_driven: bool
) -> CompiledKernel:
    launch, call = source.launch, source.calls[0]
    return CompiledKernel(
        kernel=launch.kernel.name,
        function=source.function,
        target=name,
        facts=facts_of(launch, index_driven),
        source=f"{name}/{source.name}.py",
        cubin=f"{name}/{source.name}.cubin",
        metadata=f"{name}/{source.name}.json",
        modules=source.modules,
        phase=source.phases,
        layers=source.layers,
        batch=call.batch,
        tokens=call.tokens,
        **made.resources.model_dump(),
        warps=launch.warps,
        stages=source.stages,
        tile={n: v for n, v in launch.arguments.items() if n.startswith("BLOCK_")},
        predicted_us=round(launch.kernel.seconds(launch, target) * 1e6, 3),
    )


def _compiled(
    sources: Sequence[Source], texts: Sequence[str], target: Target, progress: Say
) -> list[Compiled]:
    """Machine code of sources, compiled on all cores."""
    with tempfile.TemporaryDirectory(prefix="planner-kernels-") as folder:

        def compiled(source: Source, text: str) -> Compiled:
            path = Path(folder) / f"{source.name}.py"
            path.write_text(text, encoding="utf-8")
            function = load_function(path, source.function)
            warps, stages = source.launch.warps, source.stages
            return compile_kernel(function, source.arguments, warps=warps, stages=stages)

        results: list[Compiled] = []
        with compiling_for(target), ThreadPoolExecutor(os.cpu_count()) as pool:
            for made in pool.map(compiled, sources, texts):
                results.append(made)
                progress(f"{len(results)} of {len(sources)} kernels compiled")
        return results
