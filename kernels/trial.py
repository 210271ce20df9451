"""Generated sources as modules, and their kernels on made-up arguments, to be timed one by one.

Enters: a kernel of a `Source`. Leaves: a function that launches it. Activations and weights are
random; index tensors are such that all survivors are there and the cache is full.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from planner.kernels.codegen import Generated, Source

__all__ = ["load_source", "trial"]


def load_source(source: Source, folder: Path) -> ModuleType:
    """Import a generated file, written into a folder: Triton reads the text of its functions."""
    path = folder / f"{source.name}.py"
    path.write_text(source.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"planner_generated_{source.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trial(module: ModuleType, kernel: Generated, device: torch.device) -> Callable[[], None]:
    """A function that launches a kernel once, without waiting for it.

    Args:
        module: the imported source.
        kernel: one of its kernels, not of a token stage.
        device: CUDA; or the CPU, inside `planner.kernels.interpreter.interpreting`.
    """
    filled = {
        name: _filled(name, value, kernel.arguments).to(device)
        if isinstance(value, Tensor) and not value.is_floating_point()
        else value
        for name, value in kernel.arguments.items()
    }
    arguments = {
        name: torch.randn_like(value, device=device)
        if isinstance(value, Tensor) and value.is_meta
        else value
        for name, value in filled.items()
    }
    launch = getattr(module, kernel.name)[kernel.grid]

    def run() -> None:
        launch(**arguments, num_warps=kernel.warps, num_stages=kernel.stages)

    return run


def _filled(name: str, like: Tensor, given: Mapping[str, Any]) -> Tensor:
    """What an index tensor holds; samples and groups have rows of the cache of their own."""
    shape = like.shape
    if name in ("units", "positions", "key_positions"):
        return torch.arange(shape[-1], dtype=like.dtype).expand(shape).contiguous()
    if name == "lanes":
        return torch.full(shape, -1, dtype=like.dtype)
    if name == "counts":
        # Where there are no units a count only ends programs early: none is to.
        slots = given["units"].shape[-1] if "units" in given else 2**20
        return torch.full(shape, slots, dtype=like.dtype)
    tokens = given["positions"].shape[1] if "positions" in given else given.get("tokens", 1)
    context = given["key_positions"].shape[1] if "key_positions" in given else tokens
    if name == "first":
        return torch.arange(len(like), dtype=like.dtype) * (len(given["keys"]) // len(like))
    return torch.full(shape, context if name == "room" else context - tokens, dtype=like.dtype)
