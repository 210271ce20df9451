"""``planner bench``: measured time under budgets over measured time of the base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.command_options import (
    Budgets,
    Dtype,
    KernelChoice,
    Place,
    command,
    parse_fractions,
)
from planner.cli.console import Console, amount, table

if TYPE_CHECKING:
    from planner.planning.compiler import Request


@command(
    "model", "switches", "tokens", "kv", "utilities", "text_tokens", "batch", "trust_remote_code",
    text_tokens="Prompt tokens, about.",
)  # fmt: skip
def bench_command(
    request: Request,
    console: Console,
    budgets: Budgets = "0.5,0.65,0.85,1",
    decode: Annotated[int, typer.Option("--decode", help="Tokens to generate.")] = 32,
    repeat: Annotated[int, typer.Option("--repeat", help="Interleaved rounds.")] = 7,
    dtype: Dtype = "auto",
    device: Place = "cpu",
    kernels: KernelChoice = "auto",
) -> None:
    """Measure prefill and decoding under budgets, against the base model in the same run."""
    from planner.cli.measuring import measure
    from planner.ir.errors import InputError
    from planner.loading import load_model, noise_image, prompt_inputs

    fractions = parse_fractions(budgets)
    for name, value, least in (
        ("decode", decode, 2),
        ("repeat", repeat, 1),
        ("batch", request.batch, 1),
        ("text-tokens", request.text_tokens, 1),
    ):
        if value < least:
            raise InputError(f"--{name} must be at least {least}")
    with console.status() as update:
        update("load")
        stock, processor, source = load_model(
            request.model, dtype, device, request.trust_remote_code
        )
        picture = noise_image() if "vision_config" in source.config else None
        prompt = "what is this ? " * (request.text_tokens // 4)
        inputs = prompt_inputs(stock, processor, prompt, picture)
        inputs = {k: v.repeat(request.batch, *[1] * (v.ndim - 1)) for k, v in inputs.items()}
        report = measure(
            stock, inputs, fractions, request.switches, decode, repeat, update,
            tokens=request.tokens, kv=request.kv, utilities=request.utilities, kernels=kernels,
        )  # fmt: skip
    console.show(report, lambda: _print(report))


# A clock is called steady if the slowest round of the base model takes at most so many times the
# quickest.
_STEADY = 1.2


def _ranged(value: float, ends: Sequence[float]) -> str:
    """A median and its range."""
    return f"{value:.3f} ({ends[0]:.2f}-{ends[1]:.2f})"


def _print(report: dict[str, Any]) -> None:
    print(
        f"{report['image_tokens']} image + {report['text_tokens']} text tokens, batch "
        f"{report['batch']}, medians of {report['repeat']} interleaved rounds and, in brackets, "
        "the least and the most; realised / ideal is measured time over base time, over the "
        "fraction of FLOPs"
    )
    base = report["rows"][0]
    spread = max(high / low for low, high in (base["prefill_range"], base["decode_range"]))
    if spread > _STEADY:
        print(
            f"note: the base model's own times differ by a factor of {spread:.2f} between rounds, "
            f"so this machine was busy: take the ratios with care, or more rounds (--repeat)"
        )
    rows = [
        [
            row["budget"],
            f"{row['fraction']:.4f}",
            amount(row["prefill_seconds"], "latency"),
            _ranged(row["prefill_ratio"], row["prefill_range"]),
            f"{row['realised_over_ideal']:.3f}",
            f"{row['decode_tokens_per_second']:.1f}",
            _ranged(row["decode_speedup"], row["decode_range"]),
            amount(row["kv_bytes"], "bytes"),
        ]
        for row in report["rows"]
    ]
    headers = [
        "budget", "FLOPs", "prefill", "over base", "realised/ideal", "tokens/s", "decode speed-up",
        "KV",
    ]  # fmt: skip
    table(headers, rows)
