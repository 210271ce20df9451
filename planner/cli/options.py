"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "Batch",
    "Device",
    "Dtype",
    "ImageTokens",
    "Model",
    "NewTokens",
    "TextTokens",
    "TrustRemoteCode",
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
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
