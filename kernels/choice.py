"""Who computes an operator under a plan: planner's Triton kernels, or PyTorch.

The user says `Kernels.TRITON` or `Kernels.TORCH`, or leaves it to the rules here (`AUTO`): on a CPU
PyTorch, on a GPU whoever the cost model expects to be done sooner. PyTorch is taken at the roofline
of the device, kernel by kernel as it would launch them; planner's kernels by the model that chose
their tiles. So wide products of a plan that keeps one run of features stay with cuBLAS, and those
of many short runs, single tokens' attention and MLPs without their round trips through memory go to
Triton where that is worth it. Nothing is timed.
"""

from __future__ import annotations

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
        """Read a user's choice.

        Raises:
            InputError: it is none of the three, or Triton is not installed.
        """
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

    Such are all ops of compiled graphs, whose survivors are tensors that change between calls
    (PyTorch reads them on the host), and token stages. On a CPU Triton is an interpreter, for tests
    and debugging alone.
    """
    if kernels is Kernels.AUTO:
        return device.type == "cuda" and has_triton()
    return kernels is Kernels.TRITON


@lru_cache(maxsize=4096)
def product_is_faster(
    device: torch.device, rows: int, columns: int, depth: int, pieces: int, element_bytes: int
) -> bool:
    """Whether Triton is faster for a product with some of a weight's rows or columns.

    Args:
        device: a GPU.
        rows: of activations.
        columns, depth: of the product, what is left out not counted.
        pieces: runs of kept features, each a launch of cuBLAS.
        element_bytes: of activations and weights.
    """
    target = target_of_device(device)
    triton = _product_seconds(target, rows, columns, depth, element_bytes)
    return triton < _torch_product_seconds(target, rows, columns, depth, pieces, element_bytes)


@lru_cache(maxsize=4096)
def mlp_is_faster(
    device: torch.device,
    rows: int,
    hidden: int,
    neurons: int,
    gated: bool,
    pieces: int,
    element_bytes: int,
) -> bool:
    """Whether Triton is faster for an MLP of so many kept neurons, in so many runs.

    PyTorch writes what gate and up give, and reads it for the activation; other arguments as those
    of `product_is_faster`.
    """
    target, parts = target_of_device(device), 1 + gated
    triton = _product_seconds(target, rows, neurons, hidden, element_bytes, parts)
    triton += _product_seconds(target, rows, hidden, neurons, element_bytes)
    torch_ = parts * _torch_product_seconds(target, rows, neurons, hidden, pieces, element_bytes)
    torch_ += _torch_product_seconds(target, rows, hidden, neurons, pieces, element_bytes)
    inner = rows * neurons * element_bytes
    torch_ += _launched(target.roofline(0, 2 * inner)) + gated * _launched(
        target.roofline(0, 3 * inner)
    )
    return triton < torch_


@lru_cache(maxsize=4096)
def attention_is_faster(
    device: torch.device,
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    keys: int,
    head_dim: int,
    element_bytes: int,
) -> bool:
    """Whether Triton is faster for some attention.

    Prompts stay with PyTorch's fused attention. A single token's is bound by reading keys and
    values, by as many programs as there are: PyTorch has one a head, Triton splits the keys.
    """
    if tokens > 1:
        return False
    target = target_of_device(device)
    moved = 2 * batch * kv_heads * keys * head_dim * element_bytes
    splits = decode_splits(batch * kv_heads, keys, target)
    triton = _read_seconds(target, moved, batch * kv_heads * splits)
    triton = _launched(triton) + (_LAUNCH_SECONDS if splits > 1 else 0.0)
    return triton < _launched(_read_seconds(target, moved, batch * heads))


def _product_seconds(
    target: Target, rows: int, columns: int, depth: int, element_bytes: int, parts: int = 1
) -> float:
    product = Product(rows, columns, depth, target, 1, element_bytes, parts)
    return _launched(matmul_seconds(matmul_tile(product), product))


def _torch_product_seconds(
    target: Target, rows: int, columns: int, depth: int, pieces: int, element_bytes: int
) -> float:
    """Pieces one after the other, and then joined or added up."""
    operations = 2 * rows * columns * depth
    moved = (rows * depth + columns * depth + rows * columns) * element_bytes
    each = _launched(target.roofline(operations / pieces, moved / pieces))
    joined = _launched(target.roofline(0, 2 * rows * columns * element_bytes))
    return pieces * each + (joined if pieces > 1 else 0.0)


def _read_seconds(target: Target, moved: int, programs: int) -> float:
    """Memory is read at full speed only if all processors do."""
    waves = ceil(programs / target.processors)
    return target.roofline(0, moved) * waves * target.processors / programs


def _launched(seconds: float) -> float:
    return max(seconds, _LAUNCH_SECONDS)
