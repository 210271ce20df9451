"""Start a kernel: compiled on CUDA tensors, interpreted on CPU tensors, noted down on meta tensors.

The third way is how kernels are compiled ahead of time: running a block on meta tensors under
`recorded` gives the very launches, tiles and specialisations included, that it would make on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from planner.kernels.interpreter import interpret
from planner.kernels.tiles import TARGETS, Target, target_of

__all__ = ["Launch", "launch", "recorded", "target_for"]


@dataclass(frozen=True)
class Launch:
    """One kernel launch: arguments by parameter name, constexpr parameters among them."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int
    stages: int


_recording: ContextVar[tuple[Target, list[Launch]]] = ContextVar("recording")


@contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Collect the launches made on meta tensors, tiled for `target`."""
    launches: list[Launch] = []
    token = _recording.set((target, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def target_for(tensor: Tensor) -> Target:
    """The target whose tiles a tensor gets; interpreted kernels (CPU tensors) take sm_80's."""
    if tensor.is_cuda:
        return _cuda_target(tensor.device)
    return _recording.get()[0] if tensor.is_meta else TARGETS["sm_80"]


@cache
def _cuda_target(device: torch.device) -> Target:
    return target_of(torch.cuda.get_device_capability(device))


def launch(
    kernel: JITFunction,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    *,
    warps: int = 4,
    stages: int = 1,
) -> None:
    """Run `kernel` over `grid` on the device its tensors are on.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: programs along up to three axes; an empty grid runs nothing.
        arguments: by parameter name, constexpr parameters among them.
        warps: warps per program.
        stages: depth of the software pipeline.
    """
    if 0 in grid:
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    if device.type == "meta":
        _recording.get()[1].append(Launch(kernel, grid, arguments, warps, stages))
    elif device.type == "cpu":
        interpret(kernel, grid, arguments)
    else:
        with torch.cuda.device(device):
            # Fusing multiply and add is Triton's present default; naming it keeps it so.
            kernel[grid](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
