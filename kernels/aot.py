"""Compile kernels for a GPU that is not there, and read what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from planner.kernels.launch import Launch
from planner.kernels.tiles import Target

__all__ = ["Compiled", "compile_kernel", "compile_launch", "specialization"]

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Compiled:
    """A kernel in machine code.

    Attributes:
        name: the kernel's.
        target: for example ``sm_90``.
        registers: per thread.
        spill_bytes: stack frame per thread; the kernels keep nothing there but spilled registers.
        shared_bytes: shared memory per program.
        tensor_core: tensor-core instructions by kind, ``mma`` and ``wgmma``, in the code (not
            executed: loops count once).
        warps: per program.
        ptx: the assembly.
        cubin: the binary.
    """

    name: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: Mapping[str, int]
    warps: int
    ptx: str
    cubin: bytes


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile a recorded launch."""
    return compile_kernel(
        launch.kernel, launch.arguments, target, warps=launch.warps, stages=launch.stages
    )


def compile_kernel(
    kernel: JITFunction,
    arguments: Mapping[str, Any],
    target: Target,
    *,
    warps: int = 4,
    stages: int = 1,
) -> Compiled:
    """Compile a kernel as launching it with these arguments would.

    Args:
        kernel: a ``@triton.jit`` function.
        arguments: by parameter name: tensors (any device; only dtypes matter), numbers, None and
            constexpr values.
        target: architecture.
        warps: warps per program.
        stages: depth of the software pipeline.
    """
    compiled = triton.compile(
        ASTSource(kernel, *specialization(kernel, arguments)),
        target=GPUTarget("cuda", target.capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    registers, stack = _resources(cubin)
    return Compiled(
        name=kernel.fn.__name__,
        target=f"sm_{target.capability}",
        registers=registers,
        spill_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        tensor_core={
            "mma": len(re.findall(r"\bmma\.sync\b", ptx)),
            "wgmma": len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
        },
        warps=warps,
        ptx=ptx,
        cubin=cubin,
    )


def specialization(
    kernel: JITFunction, arguments: Mapping[str, Any]
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[list[Any]]]]:
    """What a launch with these arguments is compiled for: types, constants and alignments.

    Launches with equal specialisations share one compilation.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (value is True) or (value is False):
            kind, aligned = "constexpr", False
        elif isinstance(value, Tensor):
            # Allocators align tensors; views used as weights start at whole rows.
            kind, aligned = _POINTERS[value.dtype], True
        elif isinstance(value, float):
            kind, aligned = "fp32", False
        elif value == 1 and not free:
            kind, aligned = "constexpr", False
        else:
            kind, aligned = "i32", value % 16 == 0 and not free
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _resources(cubin: bytes) -> tuple[int, int]:
    # (registers, stack bytes), from the copy of cuobjdump that Triton ships.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if numbers is None:
        raise RuntimeError(f"cuobjdump reports no registers: {text}")
    return int(numbers[1]), int(numbers[2])
