"""Run a Triton kernel on the CPU, program by program, with NumPy.

Triton's own switch, the environment variable TRITON_INTERPRET, is read when a kernel is defined
and holds for the whole process: nothing can be compiled after it. Here the same kernel object is
compiled for a GPU and interpreted on the CPU, in one process. Slow: for tests and for debugging
(a breakpoint inside a kernel works).

Every load and store is checked: kernels get no real addresses but some in which each tensor has a
range of its own, far from the others', and what is not an element of the very tensor it was reached
from is refused - before and behind a tensor, between the rows of a strided one, in another tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    _patch_lang,
)
from triton.runtime.jit import JITFunction


class OutOfBounds(Exception):
    """A kernel reads or writes beyond a tensor."""


def interpret(kernel: JITFunction, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Run every program of `grid`; outputs are written into the CPU tensors among `arguments`.

    OutOfBounds where an access that no mask hides is beyond the tensor it starts from.
    """
    with _indices(), _callable_device_functions(), _bfloat16(), _quiet(), _bounds(arguments):
        try:
            _interpreted(kernel.fn).run(grid=grid, warmup=False, **arguments)
        except InterpreterError as error:
            if isinstance(error.__cause__, OutOfBounds):
                raise OutOfBounds(f"{kernel.fn.__name__} {error.__cause__}") from error
            raise


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
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Give an object other attributes inside the block."""
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def _indices() -> Iterator[None]:
    """Let scalars be bounds of loops.

    Triton 3.6 asks NumPy for the integer of an array with an axis, which NumPy 2.4 refuses.
    """
    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    with _replaced(interpreter, _patch_lang_tensor=patch):
        yield


@contextmanager
def _callable_device_functions() -> Iterator[None]:
    """Let interpreted code call compiled-by-default functions: ours, and Triton's like `tl.sum`."""
    refuse = JITFunction.__call__

    def call(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        return _rewritten(self.fn)(*arguments, **options)

    with _replaced(JITFunction, __call__=call):
        # Kernels see the language as `tl`, Triton's own device functions as `core`: patch both.
        patched = _patch_lang(FunctionType(refuse.__code__, {"tl": tl, "core": core}))
        try:
            yield
        finally:
            patched.restore()


def _quiet() -> AbstractContextManager[None]:
    """Compute no checks for overflow: without debugging their outcome is thrown away."""
    builder = interpreter.interpreter_builder
    return _replaced(builder, options=replace(builder.options, sanitize_overflow=False))


# Each tensor's range of addresses: it begins in the middle, so that nothing before it is another's.
_RANGE, _MIDDLE = 1 << 44, 1 << 43


class _Memory:
    """The tensors of one launch, at made-up addresses."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        tensors = {name: a for name, a in arguments.items() if isinstance(a, torch.Tensor)}
        self.names, self.tensors = [*tensors], [*tensors.values()]
        self.places = {_identity(tensor): i for i, tensor in enumerate(self.tensors)}
        self.elements = [_elements(tensor) for tensor in self.tensors]

    def address(self, tensor: torch.Tensor) -> int:
        """Where a kernel sees a tensor."""
        return (self.places[_identity(tensor)] + 1) * _RANGE + _MIDDLE

    def real(self, pointers: np.ndarray, mask: np.ndarray, what: str) -> np.ndarray:
        """Real addresses of made-up ones; those that are masked out stay as they are."""
        addresses = pointers.copy()
        places = pointers // np.uint64(_RANGE)
        mask = np.broadcast_to(mask, pointers.shape)
        for place in np.unique(places[mask]).tolist():
            index = int(place) - 1
            if not 0 <= index < len(self.tensors):
                raise OutOfBounds(f"{what} where there is no tensor")
            tensor, elements = self.tensors[index], self.elements[index]
            mine = mask & (places == np.uint64(place))
            start = (index + 1) * _RANGE + _MIDDLE
            distance = (pointers[mine] - np.uint64(start)).view(np.int64)
            element = distance // tensor.itemsize
            inside = (element >= 0) & (element < len(elements))
            inside &= elements[np.where(inside, element, 0)] if len(elements) else False
            if not inside.all():
                missed = element[~inside]
                raise OutOfBounds(
                    f"{what} {len(missed)} elements beyond '{self.names[index]}' of shape "
                    f"{tuple(tensor.shape)} and strides {tensor.stride()}, the first at {missed[0]}"
                )
            addresses[mine] = (distance + tensor.data_ptr()).view(np.uint64)
        return addresses


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _elements(tensor: torch.Tensor) -> np.ndarray:
    """Which places from a tensor's first element on are elements of it."""
    sizes, strides = tensor.shape, tensor.stride()
    length = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    owned = np.zeros(length if tensor.numel() else 0, dtype=bool)
    if tensor.numel():
        np.lib.stride_tricks.as_strided(owned, sizes, strides)[...] = True
    return owned


@contextmanager
def _bounds(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Give kernels made-up addresses, and check those they load from and store to."""
    memory = _Memory(arguments)
    convert = interpreter._implicit_cvt
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def address(argument: Any) -> Any:
        converted = convert(argument)
        if hasattr(argument, "data_ptr"):
            converted.handle.data = np.array([memory.address(argument)], dtype=np.uint64)
        return converted

    def checked(pointers: TensorHandle, mask: TensorHandle, what: str) -> TensorHandle:
        return TensorHandle(memory.real(pointers.data, mask.data, what), pointers.dtype)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, checked(pointers, mask, "reads"), mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, checked(pointers, mask, "writes"), value, mask, *rest)

    accesses = {"create_masked_load": checked_load, "create_masked_store": checked_store}
    with _replaced(interpreter, _implicit_cvt=address), _replaced(InterpreterBuilder, **accesses):
        yield


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

    with _replaced(InterpreterBuilder, create_dot=dot, cast_impl=cast):
        yield
