"""What a kernel of planner is: a Triton function, and all that is known about it, in one object."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from planner.ir.errors import InputError
from planner.kernels.ops.op import Op
from planner.kernels.survivors import Survivors
from planner.kernels.triton.launch import Launch, launch
from planner.kernels.triton.tiles import Product, Target, Tile, matmul_seconds, vector


@dataclass(frozen=True)
class Case:
    """One test of a kernel: a call of its op, and further arguments of the launcher."""

    name: str
    inputs: Any
    options: Mapping[str, Any] = field(default_factory=dict)


class Kernel(ABC):
    """One Triton kernel: calling the object checks shapes, allocates the result and launches it."""

    function: ClassVar[JITFunction]  # the ``@triton.jit`` function; it is named after the kernel
    # The op whose inputs it takes; None where it is only a step of another kernel.
    computes: ClassVar[type[Op] | None] = None
    # Integer parameters that the model decides: sizes and strides of weights.
    of_model: ClassVar[frozenset[str]] = frozenset()
    # Integer parameters that the plan decides. The input decides all others.
    of_plan: ClassVar[frozenset[str]] = frozenset()
    # Axis of the grid that has a program for each plan, if there is one.
    plan_axis: ClassVar[int | None] = None
    # Parameter whose entries are loaded a step ahead of the weights they lead to: they take half of
    # the pipeline, which they need not where they are known.
    indexed_by: ClassVar[str | None] = None
    # Whether it multiplies matrices, and so must compile to tensor-core code.
    multiplies: ClassVar[bool] = True
    # Of its floating inputs.
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)

    @property
    def name(self) -> str:
        """Of the op it computes, in most cases."""
        name: str = self.function.fn.__name__
        return name.removesuffix("_kernel")

    @cached_property
    def constants(self) -> frozenset[str]:
        """Parameters of which Triton compiles the value in."""
        return frozenset(p.name for p in self.function.params if p.is_constexpr)

    @abstractmethod
    def __call__(self, inputs: Any) -> Tensor:
        """Launch on the inputs of an op: what its `twin` says, unwritten where that is NaN."""

    def seconds(self, launch: Launch, target: Target) -> float:
        """What a launch takes on its target, as the cost model predicts: by default its product,
        or moving all tensors once."""
        if launch.product is not None and launch.tile is not None:
            return matmul_seconds(launch.tile, launch.product)
        return target.roofline(0, tensor_bytes(launch))

    @abstractmethod
    def cases(self) -> Iterator[Case]:
        """Inputs in float32 that reach every branch, odd sizes among them."""

    def start(
        self,
        grid: tuple[int, ...],
        arguments: Mapping[str, Any],
        *,
        warps: int = 4,
        stages: int = 1,
        survivors: Survivors | None = None,
        product: Product | None = None,
        tile: Tile | None = None,
    ) -> None:
        """Launch on the device the tensors are on; parameters that `tile` and `survivors` tell are
        filled in."""
        told: dict[str, Any] = {}
        if tile is not None:
            told |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
            told["GROUP_ROWS"] = tile.group_rows
        if survivors is not None:
            told |= {
                "units": survivors.units,
                "counts": survivors.counts,
                "lanes": survivors.lanes,
                "slots": survivors.slots,
                "plan_stride": int(survivors.plans > 1),
                "WIDTH": survivors.width,
                "VECTOR": vector(survivors.width),
            }
        told = {name: told[name] for name in self.function.arg_names if name in told}
        launch(Launch(self, grid, {**arguments, **told}, warps, stages, survivors, product, tile))


def require(holds: bool, complaint: str) -> None:
    """Raise InputError with a complaint unless something holds."""
    if not holds:
        raise InputError(complaint)


def tensor_bytes(launch: Launch) -> int:
    """Bytes of all tensors of a launch: what a kernel bound by memory moves."""
    return sum(value.nbytes for value in launch.arguments.values() if isinstance(value, Tensor))


def strides(name: str, x: Tensor | None, *axes: str) -> dict[str, int]:
    """Strides of a tensor's first axes, in elements, as parameters ``name_axis``; 0 of none."""
    return {f"{name}_{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate(axes)}
