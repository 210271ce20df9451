"""Compile kernels for a GPU that is not there, and read what the compiler made of them.

Triton itself compiles, as a launch on that GPU would have it do, and keeps the result in its own
cache: by the text of the kernel and everything it is compiled for. A second plan that shares
kernels, or a second run, compiles only what is new.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from planner.kernels.targets.manifest import Resources
from planner.kernels.triton.tiles import Target


@dataclass(frozen=True)
class Compiled:
    """A kernel in machine code.

    Its metadata is what Triton needs to know of the binary, JSON, with the cache's key as ``hash``.
    """

    resources: Resources
    metadata: str
    ptx: str
    cubin: bytes


class _AbsentGPU:
    """As much of a driver as Triton needs to compile."""

    def __init__(self, target: Target) -> None:
        self.target = GPUTarget("cuda", target.capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """No number that a GPU of this machine has."""
        return -int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Let Triton compile for a target, in all threads; nothing can be launched meanwhile."""
    before, parse, lock = driver._active, JITFunction.parse, Lock()

    def parse_alone(self: JITFunction) -> Any:
        # Up to Python 3.11.7 and 3.12.1 two threads that parse may both fail (gh-106905).
        with lock:
            return parse(self)

    driver.set_active(_AbsentGPU(target))
    JITFunction.parse = parse_alone
    try:
        yield
    finally:
        driver.set_active(before)
        JITFunction.parse = parse


def compile_kernel(
    function: JITFunction, arguments: Mapping[str, Any], *, warps: int, stages: int
) -> Compiled:
    """Compile a ``@triton.jit`` function as a launch would, inside `compiling_for`.

    Of the tensors among the arguments, on the meta device, only dtypes matter.
    """
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made = function.warmup(grid=(1,), **arguments, **options)
    ptx, cubin = made.asm["ptx"], made.asm["cubin"]
    registers, stack = _resources(cubin)
    (metadata,) = (path for name, path in made.metadata_group.items() if name.endswith(".json"))
    resources = Resources(
        registers=registers,
        spill_bytes=stack,
        shared_bytes=made.metadata.shared,
        mma=len(re.findall(r"\bmma\.sync\b", ptx)),
        wgmma=len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
    )
    return Compiled(resources, Path(metadata).read_text(encoding="utf-8"), ptx, cubin)


def remember(name: str, key: str, metadata: str, cubin: bytes) -> None:
    """Put machine code of a function, as `Compiled` has it, where Triton looks before it compiles.

    `key` is the ``hash`` of the metadata.
    """
    cache = get_cache_manager(key)
    if cache.get_group(f"{name}.json") is None:
        files = {f"{name}.json": metadata, f"{name}.cubin": cubin}
        cache.put_group(f"{name}.json", {path: cache.put(files[path], path) for path in files})


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) a thread, from the copy of cuobjdump that Triton ships."""
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
