"""Run a Triton kernel on the CPU, program by program, with NumPy.

Triton's own switch, the environment variable TRITON_INTERPRET, is read when a kernel is defined
and holds for the whole process: nothing can be compiled after it. Here the same kernel object is
compiled for a GPU and interpreted on the CPU, in one process. Slow: for tests and for debugging
(a breakpoint inside a kernel works).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    _patch_lang,
)
from triton.runtime.jit import JITFunction

__all__ = ["interpret", "interpreting"]


def interpret(kernel: JITFunction, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Run every program of `grid`; outputs are written into the CPU tensors among `arguments`."""
    with _indices(), _callable_device_functions(), _bfloat16():
        _interpreted(kernel.fn).run(grid=grid, warmup=False, **arguments)


@contextmanager
def interpreting() -> Iterator[None]:
    """Interpret every launch ``kernel[grid](...)`` inside the block, whoever makes it."""
    compiled = JITFunction.run

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = {k: v for k, v in options.items() if k in self.arg_names}
        interpret(self, grid, dict(zip(self.arg_names, arguments, strict=False)) | named)

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = compiled


@cache
def _interpreted(python: FunctionType) -> InterpretedFunction:
    # A copy of the globals: the interpreter adds names of its own to the function's namespace.
    copied = FunctionType(
        python.__code__, dict(python.__globals__), python.__name__, python.__defaults__
    )
    copied.__annotations__ = python.__annotations__
    copied.__module__ = python.__module__
    return InterpretedFunction(copied)


@cache
def _rewritten(python: FunctionType) -> Callable[..., Any]:
    rewritten: Callable[..., Any] = _interpreted(python).rewrite()
    return rewritten


@contextmanager
def _indices() -> Iterator[None]:
    """Let scalars be bounds of loops.

    Triton 3.6 asks NumPy for the integer of an array with an axis, which NumPy 2.4 refuses.
    """
    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch
    try:
        yield
    finally:
        interpreter._patch_lang_tensor = plain


@contextmanager
def _callable_device_functions() -> Iterator[None]:
    """Let interpreted code call compiled-by-default functions: ours, and Triton's like `tl.sum`."""
    refuse = JITFunction.__call__

    def call(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        return _rewritten(self.fn)(*arguments, **options)

    JITFunction.__call__ = call
    # Kernels see the language as `tl`, Triton's own device functions as `core`: patch both.
    patched = _patch_lang(FunctionType(refuse.__code__, {"tl": tl, "core": core}))
    try:
        yield
    finally:
        patched.restore()
        JITFunction.__call__ = refuse


@contextmanager
def _bfloat16() -> Iterator[None]:
    """Compute with bfloat16 as a GPU does.

    The interpreter holds it as uint16, multiplies these integers in a dot product, and cuts float32
    down to it where hardware rounds to nearest even.
    """
    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return plain_dot(self, widened(a), widened(b), *rest)

    def cast(self: Any, source: TensorHandle, to: Any) -> TensorHandle:
        before, after = source.dtype.scalar, to.scalar
        if (before, after) == (tl.bfloat16, tl.float32):
            return widened(source)
        if (before, after) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return plain_cast(self, source, to)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast
    try:
        yield
    finally:
        InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = plain_dot, plain_cast
