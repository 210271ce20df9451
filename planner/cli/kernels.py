"""``planner kernels``: what the compiler made of a plan's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.command_options import command
from planner.cli.console import Console, amount, print_records, say
from planner.planning.request import Request

if TYPE_CHECKING:
    from planner.kernels.choice import Kernels
    from planner.kernels.targets.loaded_kernels import Loaded
    from planner.kernels.targets.manifest import CompiledKernel, Manifest

KernelsToRun = Annotated[
    str,
    typer.Option(
        help="Who computes: triton, torch, or auto, the faster; or a folder of planner compile "
        "--target, whose kernels then run.",
    ),
]


@dataclass(frozen=True)
class KernelOptions:
    """What ``planner compile`` is told of kernels to write."""

    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Compile kernels for this GPU too: sm_80, sm_86, sm_89 or sm_90; repeatable."
        ),
    ] = None
    index_driven: Annotated[
        bool,
        typer.Option(
            "--index-driven", help="Kernels that read what survives from tensors: for any plan."
        ),
    ] = False
    autotune: Annotated[
        bool,
        typer.Option(
            "--autotune", help="Time tiles on the GPU at hand; remembered for the next time."
        ),
    ] = False
    dtype: Annotated[
        str, typer.Option(help="Of the kernels' tensors [default: what the config names].")
    ] = "auto"

    def builder(self, request: Request) -> Callable[..., tuple[Manifest, dict[str, bytes]]] | None:
        """`build_kernels` as these options ask for it; None for no kernels.

        InputError where a target or dtype is none of the kernels', or Triton is not there.
        """
        from planner.ir.errors import InputError
        from planner.planning.catalog import find_model

        if not self.target:
            if self.index_driven or self.autotune or self.dtype != "auto":
                raise InputError(
                    "--index-driven, --autotune and --dtype are about kernels: name a --target too"
                )
            return None
        # Torch comes with these.
        from planner.kernels.triton.tiles import targets_of

        targets = targets_of(self.target)
        if find_spec("triton") is None:
            raise InputError(
                "--target needs triton, which is not installed (there is one for Linux)"
            )
        dtype = self.dtype
        if dtype == "auto":
            dtype = find_model(request.model, request.trust_remote_code).dtype
        if dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"no kernel computes in {dtype}: choose float32, bfloat16 or float16")
        import torch

        from planner.kernels.targets.build import build_kernels

        return partial(
            build_kernels,
            targets=targets,
            dtype=getattr(torch, dtype),
            index_driven=self.index_driven,
            autotune=self.autotune,
        )


def kernels_to_run(option: str, place: str) -> tuple[Kernels, Loaded | None]:
    """Who computes, and the generated kernels where ``--kernels`` names a folder of them.

    InputError where it names nothing, or kernels that cannot be run here.
    """
    from planner.kernels.choice import Kernels

    if not Path(option).is_dir():
        return Kernels.of(option), None
    chosen = Kernels.of(Kernels.TRITON)
    from planner.kernels.targets.loaded_kernels import load_kernels

    return chosen, load_kernels(Path(option), place)


@command()
def kernels_command(
    console: Console,
    folder: Annotated[
        Path, typer.Argument(help="What planner compile --target was given with -o.")
    ],
    target: Annotated[list[str] | None, typer.Option(help="Only this target; repeatable.")] = None,
) -> None:
    """Per kernel and target: registers, spills, shared memory, tensor cores, predicted time."""
    from planner.ir.errors import InputError
    from planner.kernels.targets.manifest import read_manifest

    manifest = read_manifest(folder)
    known = list(dict.fromkeys(kernel.target for kernel in manifest.kernels))
    for name in target or ():
        if name not in known:
            raise InputError(
                f"there are no kernels for '{name}' in '{folder}', but for {', '.join(known)}"
            )
    rows = [kernel for kernel in manifest.kernels if not target or kernel.target in target]
    console.show(
        manifest.model_copy(update={"kernels": rows}).model_dump(),
        lambda: _print_kernels(manifest, rows, console.verbose),
    )


def _print_kernels(manifest: Manifest, rows: list[CompiledKernel], verbose: bool) -> None:
    """Tables by target, and what each step would take."""
    kind = "any plan" if manifest.index_driven else f"plan {manifest.plan}"
    print(f"{manifest.model}, {kind}, {manifest.dtype}; triton {manifest.versions['triton']}")
    columns = {
        **{name: f"{{{name}}}" for name in ("kernel", "modules", "phase", "layers", "tokens")},
        "registers": "{registers}",
        "spilled": "{spill_bytes} B",
        "shared": "{shared}",
        "mma": "{mma}",
        "wgmma": "{wgmma}",
        "predicted": "{predicted}",
        **({"warps": "{warps}", "tile": "{sizes}"} if verbose else {}),
    }
    for target in dict.fromkeys(kernel.target for kernel in rows):
        print()
        print_records(columns, [_cells(k) for k in rows if k.target == target], title=target)
    print()
    print("predicted by the cost model for one run of the kernel; nothing was timed")
    for sentence in manifest.left_out:
        say(f"no kernels: {sentence}")


def _cells(kernel: CompiledKernel) -> dict[str, Any]:
    return kernel.model_dump() | {
        "shared": amount(kernel.shared_bytes, "bytes"),
        "predicted": amount(kernel.predicted_us * 1e-6, "latency"),
        "sizes": "x".join(str(size) for size in kernel.tile.values()),
    }
