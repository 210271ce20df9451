"""``planner calibrate``: measure what this machine takes, as a device for latency budgets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from planner.cli.command_options import TrustRemoteCode, command
from planner.cli.console import Console, amount, say, table

if TYPE_CHECKING:
    from planner.ir.cost.measured_device import MeasuredDevice, Passes
    from planner.models.profiling.operator_cases import Bench
    from planner.models.profiling.subjects import Subject


@command()
def calibrate_command(
    console: Console,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Device file (.json), for --device.")
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Measure passes of this model as well."),
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(help="Longest prompts of the model, besides a picture.")
    ] = 600,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Precision of the numbers.")
    ] = "float32",
    place: Annotated[Literal["cpu", "cuda"], typer.Option("--on", help="What to measure.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of a CPU [default: as PyTorch takes].")] = 0,
    rounds: Annotated[int, typer.Option(help="How often to time every operator.")] = 5,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure what operators and whole passes take on this machine; it takes minutes.

    With a model its own passes are measured, and plans for it keep deadlines more closely; the rest
    of a file that is of this machine stays as it is. A killed run continues when the same command
    is given again.
    """
    import torch

    from planner.files import check_output
    from planner.ir.errors import InputError
    from planner.models.profiling import machine_of, profile, profile_model
    from planner.models.profiling.operator_cases import Bench
    from planner.planning.device_file import read_device, save_device

    if min(rounds, text_tokens) < 1 or not 0 <= threads <= (os.cpu_count() or threads):
        raise InputError(
            "--rounds and --text-tokens must be at least 1, --threads not negative and at most as "
            "many as there are processors"
        )
    if place == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here")
    check_output(output, ".json")
    found = read_device(output) if output.is_file() else None
    if threads:
        torch.set_num_threads(threads)
    bench = Bench(torch.device(place), getattr(torch, dtype))
    if found is not None and found.machine != (here := machine_of(bench.place)):
        other = ", ".join(
            f"{name} {was}" for name, was in found.machine.items() if was != here.get(name)
        )
        raise InputError(
            f"'{output}' is of another machine or other libraries ({other}): name another file, or "
            "remove this one"
        )
    subject = None if model is None else _loaded(model, bench, trust_remote_code)
    if found is None or subject is None or dtype not in found.measured:
        with _partial(output, dtype) as path:
            made = profile(output.stem, bench, rounds, path, console.progress_bar)
            others = {} if found is None else found.measured
            found = replace(made, measured={**others, **made.measured})
            save_device(output, found)
    repeats = None
    if subject is not None:
        with _partial(output, f"{dtype}.{subject.graph.properties['fingerprint']}") as path:
            found, repeats = profile_model(found, subject, text_tokens, path, console.progress_bar)
            save_device(output, found)
    document = _facts(output, found, dtype, subject, repeats)
    console.show(document, lambda: _print(document))


def _loaded(name: str, bench: Bench, trust_remote_code: bool) -> Subject:
    """A model with its shortest prompt."""
    from planner.ir.lowering import lower_model
    from planner.loading import load_model, noise_image, prompt_inputs
    from planner.models.profiling.subjects import Subject

    precision = str(bench.dtype).removeprefix("torch.")
    model, processor, _ = load_model(name, precision, str(bench.place), trust_remote_code)
    picture = noise_image() if hasattr(processor, "image_processor") else None
    inputs = prompt_inputs(model, processor, "what is this ?", picture)
    floats = {k: v.to(bench.dtype) for k, v in inputs.items() if v.is_floating_point()}
    return Subject.of(bench, model, lower_model(model, name), {**inputs, **floats})


@contextmanager
def _partial(output: Path, what: str) -> Iterator[Path]:
    """The file that keeps what was timed until it stands in the device file."""
    path = output.with_name(f"{output.name}.{what}.partial")
    try:
        yield path
    except KeyboardInterrupt:
        if path.exists():
            say(f"what was measured is in '{path}': the same command goes on from there")
        raise
    path.unlink(missing_ok=True)


def _facts(
    output: Path,
    found: MeasuredDevice,
    dtype: str,
    subject: Subject | None,
    repeats: float | None,
) -> dict[str, Any]:
    known = found.measured[dtype]
    passes, errors = known.passes, {"operators": known.errors, **_errors(known.passes, "any model")}
    if subject is not None:
        passes = known.models[str(subject.graph.properties["fingerprint"])]
        errors |= _errors(passes, subject.graph.name)
    return {
        "device": str(output),
        "machine": found.machine,
        "dtype": dtype,
        "tflops": found.tflops,
        "bandwidth_gb_per_s": found.bandwidth_gb_per_s,
        "terms": {kind: one.terms for kind, one in passes.items()},
        "errors": errors,
        "late": passes["prompt"].late,
        "repeats_differ": repeats,
    }


def _errors(passes: Mapping[str, Passes], of: str) -> dict[str, Mapping[str, float]]:
    return {f"{kind}s of {of}": one.errors for kind, one in passes.items()}


def _print(facts: dict[str, Any]) -> None:
    machine, terms = facts["machine"], facts["terms"]["prompt"]
    print(f"{machine['processor']}, {machine['threads']} threads, {facts['dtype']}")
    print(f"{facts['tflops']:.3g} TFLOP/s, {facts['bandwidth_gb_per_s']:.3g} GB/s at best")
    print(
        f"besides its operators a prompt takes {amount(terms['pass'], 'latency')}, and "
        f"{amount(terms['operator'], 'latency')} for each of them"
    )
    names = ("median", "p90", "p95")
    rows = [
        [what, *(f"{off[name]:.1%}" for name in names)] for what, off in facts["errors"].items()
    ]
    table(["predictions are off", *names], rows)
    print(f"one prompt in a hundred takes {facts['late']:.1%} longer than predicted, or more")
    if facts["repeats_differ"] is not None:
        print(f"the same pass, measured twice, differs by {facts['repeats_differ']:.1%} (median)")
    print(f"wrote {facts['device']}")
