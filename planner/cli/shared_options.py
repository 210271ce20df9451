"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "Batch",
    "Device",
    "Dtype",
    "ImageTokens",
    "KvPolicyOption",
    "Model",
    "NewTokens",
    "TextTokens",
    "TrustRemoteCode",
    "parse_fractions",
]

Model = Annotated[
    str, typer.Option("--model", "-m", help="Alias, local folder with a config, or hub id.")
]
Device = Annotated[
    str | None, typer.Option("--device", help="Device of the roofline (see: planner devices).")
]
ImageTokens = Annotated[
    int | None,
    typer.Option("--image-tokens", help="Visual tokens a sample [default: one image]."),
]
TextTokens = Annotated[int, typer.Option("--text-tokens", help="Prompt tokens besides them.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="Generated tokens, for KV bytes.")]
Batch = Annotated[int, typer.Option("--batch", help="Samples that run together.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
KvPolicyOption = Annotated[
    str | None,
    typer.Option("--kv", help="A cache that evicts, such as h2o:heavy=0.2,recent=0.2."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]


def parse_fractions(text: str) -> list[float]:
    """Fractions separated by commas.

    Raises:
        InputError: they are not.
    """
    from planner.ir.errors import InputError

    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--budgets '{text}' is not a list such as 0.5,0.65,1") from None
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise InputError(f"budget '{fraction:g}' must be more than 0 and at most 1")
    return fractions
