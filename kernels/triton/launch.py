"""Start a kernel: compiled on CUDA tensors, interpreted on CPU tensors, recorded on meta tensors.

Recorded launches are those that an op would make on a GPU; they are compiled ahead of time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from planner.kernels.survivors import Survivors
from planner.kernels.triton.interpreter import interpret
from planner.kernels.triton.tiles import TARGETS, Product, Target, Tile, holding, target_of_device

if TYPE_CHECKING:
    from planner.kernels.triton.kernel import Kernel


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    kernel: Kernel
    grid: tuple[int, ...]  # programs along up to three axes; an empty grid runs nothing
    arguments: Mapping[str, Any]  # by parameter name, constexpr parameters among them
    # Of a program, and of its software pipeline.
    warps: int
    stages: int
    survivors: Survivors | None = None  # whose tensors are among the arguments
    # What a kernel that multiplies matrices computes, and by what tile.
    product: Product | None = None
    tile: Tile | None = None

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(a.device for a in self.arguments.values() if isinstance(a, Tensor))


# Asked at each launch on a real device: returns True where it has run a generated kernel instead.
loaded: ContextVar[Callable[[Launch], bool] | None] = ContextVar("loaded", default=None)
_interpreted_target: ContextVar[Target] = ContextVar("target", default=TARGETS["sm_80"])
_recording: ContextVar[tuple[Target, list[Launch]]] = ContextVar("recording")
_counters: ContextVar[tuple[Counter[str], ...]] = ContextVar("counters", default=())


@contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Collect the launches made on meta tensors, tiled for `target`."""
    launches: list[Launch] = []
    with holding(_recording, (target, launches)):
        yield launches


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the kernels that run inside the block, by name, interpreted ones too."""
    counter: Counter[str] = Counter()
    with holding(_counters, (*_counters.get(), counter)):
        yield counter


def interpreted_for(target: Target) -> AbstractContextManager[None]:
    """Tile kernels on CPU tensors for `target`, inside the block."""
    return holding(_interpreted_target, target)


def target_for(tensor: Tensor) -> Target:
    """The target whose tiles a tensor gets; interpreted kernels take sm_80's, unless told."""
    if tensor.is_cuda:
        return target_of_device(tensor.device)
    return _recording.get()[0] if tensor.is_meta else _interpreted_target.get()


def launch(wanted: Launch) -> None:
    """Run a kernel on the device its tensors are on, or record it."""
    if 0 in wanted.grid:
        return
    if wanted.device.type == "meta":
        _recording.get()[1].append(wanted)
        return
    for counter in _counters.get():
        counter[wanted.kernel.name] += 1
    generated = loaded.get()
    if generated is None or not generated(wanted):
        run(wanted.kernel.function, wanted)


def run(function: JITFunction, wanted: Launch) -> None:
    """Run a launch by a function: its kernel's, or one made of that with fewer parameters."""
    arguments = {name: wanted.arguments[name] for name in function.arg_names}
    if wanted.device.type == "cpu":
        interpret(function, wanted.grid, arguments)
        return
    with torch.cuda.device(wanted.device):
        # Fusing multiply and add is Triton's present default; naming it keeps it so.
        options = {"num_warps": wanted.warps, "num_stages": wanted.stages}
        function[wanted.grid](**arguments, **options, enable_fp_fusion=True)
