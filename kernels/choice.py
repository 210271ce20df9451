"""Who computes an operator under a plan: planner's Triton kernels, or PyTorch.

The user says, or leaves it to the rules here (`Kernels.AUTO`): on a CPU PyTorch, on a GPU whoever
the cost model expects to be done sooner. PyTorch is taken at the roofline of the device, kernel by
kernel as it would launch them; planner's kernels by the model that chose their tiles. So wide
products of a plan that keeps one run of features stay with cuBLAS, and many short runs, single
tokens' attention and MLPs without their round trips through memory go to Triton. Nothing is timed.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from functools import cache, lru_cache
from importlib.util import find_spec
from math import ceil

import torch

from planner.ir.errors import InputError
from planner.kernels.triton.tiles import (
    Product,
    Target,
    decode_splits,
    matmul_seconds,
    matmul_tile,
    target_of_device,
)

# What no kernel launch is shorter than, about: starting it, and waiting for its last program.
_LAUNCH_SECONDS = 3e-6


class Kernels(StrEnum):
    """What a model's operators run on: ``auto`` decides by operator and device."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"

    @staticmethod
    def of(value: object) -> Kernels:
        """Read a user's choice; InputError where it is none, or Triton is not installed."""
        try:
            chosen = Kernels(str(value))
        except ValueError:
            names = ", ".join(Kernels)
            raise InputError(f"kernels is {value!r}: choose from {names}") from None
        if chosen is Kernels.TRITON and not has_triton():
            raise InputError("kernels='triton' needs Triton, which is not installed here")
        return chosen


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not made for every platform."""
    return find_spec("triton") is not None


def with_triton(kernels: Kernels, device: torch.device) -> bool:
    """Whether Triton computes an op for which PyTorch would copy much, or wait for the device.

    Such are token stages and all ops of compiled graphs, whose survivors change between calls. On a
    CPU Triton is an interpreter, for tests and debugging.
    """
    if kernels is Kernels.AUTO:
        return device.type == "cuda" and has_triton()
    return kernels is Kernels.TRITON


def linear_product(x: torch.Tensor, columns: int, depth: int, parts: int = 1) -> Product:
    """What a linear with so many kept features does with activations on a GPU."""
    rows, target = x.numel() // max(x.shape[-1], 1), target_of_device(x.device)
    return Product(rows, columns, depth, target, element_bytes=x.itemsize, parts=parts)


@lru_cache(maxsize=4096)
def product_is_faster(product: Product, pieces: int) -> bool:
    """Whether Triton is faster for a product with some of a weight's rows or columns.

    `product`: on a GPU; what is left out not counted. `pieces`: runs of kept features, each a
    launch of cuBLAS.
    """
    return _triton_seconds(product) < _torch_seconds(product, pieces)


@lru_cache(maxsize=4096)
def mlp_is_faster(inner: Product, pieces: int) -> bool:
    """Whether Triton is faster for an MLP of some kept neurons.

    PyTorch writes what gate and up give, and reads it for the activation.

    `inner`: of its kept neurons, with two parts where there is a gate. `pieces`: as of
    `product_is_faster`.
    """
    outer = replace(inner, columns=inner.depth, depth=inner.columns, parts=1)
    triton = _triton_seconds(inner) + _triton_seconds(outer)
    moved = inner.rows * inner.columns * inner.element_bytes
    torch_ = inner.parts * _torch_seconds(replace(inner, parts=1), pieces)
    torch_ += _torch_seconds(outer, pieces) + _launched(inner.target.roofline(0, 2 * moved))
    torch_ += (inner.parts - 1) * _launched(inner.target.roofline(0, 3 * moved))
    return triton < torch_


@lru_cache(maxsize=4096)
def attention_is_faster(
    device: torch.device, query: tuple[int, ...], key: tuple[int, ...], element_bytes: int
) -> bool:
    """Whether Triton is faster for an attention of query and key of some shapes.

    Prompts stay with PyTorch's fused attention. A single token's is bound by reading keys and
    values, by as many programs as there are: PyTorch has one a head, Triton splits the keys.
    """
    (batch, heads, tokens, head_dim), (kv_heads, keys) = query, key[1:3]
    if tokens > 1:
        return False
    target = target_of_device(device)
    moved = 2 * batch * kv_heads * keys * head_dim * element_bytes
    splits = decode_splits(batch * kv_heads, keys, target)
    triton = _read_seconds(target, moved, batch * kv_heads * splits)
    triton = _launched(triton) + (_LAUNCH_SECONDS if splits > 1 else 0.0)
    return triton < _launched(_read_seconds(target, moved, batch * heads))


def _triton_seconds(product: Product) -> float:
    return _launched(matmul_seconds(matmul_tile(product), product))


def _torch_seconds(product: Product, pieces: int) -> float:
    """Pieces one after the other, and then joined or added up."""
    rows, columns, depth = product.rows, product.columns, product.depth
    operations = 2 * rows * columns * depth
    moved = (rows * depth + columns * depth + rows * columns) * product.element_bytes
    each = _launched(product.target.roofline(operations / pieces, moved / pieces))
    joined = _launched(product.target.roofline(0, 2 * rows * columns * product.element_bytes))
    return pieces * each + (joined if pieces > 1 else 0.0)


def _read_seconds(target: Target, moved: int, programs: int) -> float:
    """Memory is read at full speed only if all processors do."""
    waves = ceil(programs / target.processors)
    return target.roofline(0, moved) * waves * target.processors / programs


def _launched(seconds: float) -> float:
    return max(seconds, _LAUNCH_SECONDS)
