"""``planner bench``: measured time under budgets over measured time of the base model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from planner.cli.command_options import (
    Budgets,
    Dtype,
    KernelChoice,
    Place,
    command,
    parse_fractions,
)
from planner.cli.console import Console, amount, print_records
from planner.planning.request import Request


@command(
    "model", "switches", "tokens", "kv", "utilities", "text_tokens", "batch", "trust_remote_code",
    text_tokens="Prompt tokens, about.",
)  # fmt: skip
def bench_command(
    request: Request,
    console: Console,
    budgets: Budgets = "0.5,0.65,0.85,1",
    decode: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 7,
    dtype: Dtype = "auto",
    device: Place = "cpu",
    kernels: KernelChoice = "auto",
) -> None:
    """Measure prefill and decoding under budgets, against the base model in the same run."""
    from planner.cli.measuring import measure
    from planner.ir.errors import InputError
    from planner.loading import load_model, noise_image, prompt_inputs

    fractions = parse_fractions(budgets)
    for name, value in (("batch", request.batch), ("text-tokens", request.text_tokens)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1")
    with console.status() as update:
        update("load")
        stock, processor, source = load_model(
            request.model, dtype, device, request.trust_remote_code
        )
        picture = noise_image() if "vision_config" in source.config else None
        prompt = "what is this ? " * (request.text_tokens // 4)
        inputs = prompt_inputs(stock, processor, prompt, picture)
        inputs = {k: v.repeat(request.batch, *[1] * (v.ndim - 1)) for k, v in inputs.items()}
        report = measure(stock, inputs, fractions, request, decode, repeat, kernels, update)
    console.show(report, lambda: _print(report))


# A clock is called steady if the slowest round of the base model takes at most so many times the
# quickest.
_STEADY = 1.2


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
        {
            **row,
            "prefill": amount(row["prefill_seconds"], "latency"),
            "kv": amount(row["kv_bytes"], "bytes"),
        }
        for row in report["rows"]
    ]
    columns = {
        "budget": "{budget}",
        "FLOPs": "{fraction:.4f}",
        "prefill": "{prefill}",
        "over base": "{prefill_ratio:.3f} ({prefill_range[0]:.2f}-{prefill_range[1]:.2f})",
        "realised/ideal": "{realised_over_ideal:.3f}",
        "tokens/s": "{decode_tokens_per_second:.1f}",
        "decode speed-up": "{decode_speedup:.3f} ({decode_range[0]:.2f}-{decode_range[1]:.2f})",
        "KV": "{kv}",
    }
    print_records(columns, rows)
