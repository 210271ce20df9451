"""``planner calibrate``: measure what this machine takes, as a device for latency budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from planner.cli.command_options import command
from planner.cli.console import Console, amount, say, table


@command()
def calibrate_command(
    console: Console,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Device file (.json), for --device.")
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Precision of the numbers.")
    ] = "float32",
    place: Annotated[Literal["cpu", "cuda"], typer.Option("--on", help="What to measure.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of a CPU [default: as PyTorch takes].")] = 0,
    rounds: Annotated[int, typer.Option(help="How often to time everything.")] = 5,
) -> None:
    """Measure what operators and whole passes take on this machine; it takes minutes.

    A killed run continues when the same command is given again. What the file knows of another
    precision stays in it, if it was measured on the same machine.
    """
    import torch

    from planner.files import check_output
    from planner.ir.errors import InputError
    from planner.models.profiling import profile
    from planner.models.profiling.operator_cases import Bench
    from planner.planning.device_file import read_device, save_device

    if rounds < 1 or threads < 0:
        raise InputError("--rounds must be at least 1, and --threads not negative")
    if place == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here")
    check_output(output, ".json")
    before = read_device(output) if output.is_file() else None
    if threads:
        torch.set_num_threads(threads)
    bench = Bench(torch.device(place), getattr(torch, dtype))
    partial = output.with_name(f"{output.name}.{dtype}.partial")
    try:
        found = profile(output.stem, bench, rounds, partial, console.progress_bar)
    except KeyboardInterrupt:
        if partial.exists():
            say(f"what was measured is in '{partial}': the same command goes on from there")
        raise
    if before is not None and before.machine == found.machine:
        found = replace(found, measured={**before.measured, **found.measured})
    save_device(output, found)
    partial.unlink(missing_ok=True)
    known = found.measured[dtype]
    document = {
        "device": str(output),
        "machine": found.machine,
        "dtype": dtype,
        "tflops": found.tflops,
        "bandwidth_gb_per_s": found.bandwidth_gb_per_s,
        "operator_seconds": known.operator_seconds,
        "pass_seconds": known.pass_seconds,
        "factors": known.factors,
        "errors": known.errors,
    }

    def text() -> None:
        print(f"{found.machine['processor']}, {found.machine['threads']} threads, {dtype}")
        print(f"{found.tflops:.3g} TFLOP/s, {found.bandwidth_gb_per_s:.3g} GB/s at best")
        print(
            f"besides its operators a pass takes {amount(known.pass_seconds, 'latency')}, and "
            f"{amount(known.operator_seconds, 'latency')} for each of them"
        )
        names = ("median", "p90", "p95")
        rows = [
            [what, *(f"{off[name]:.1%}" for name in names)] for what, off in known.errors.items()
        ]
        table(["predictions are off", *names], rows)
        print(f"wrote {output}")

    console.show(document, text)
