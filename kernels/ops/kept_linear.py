"""Products of a model under a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from planner.kernels.ops.product_probe import OTHER_WAYS, by_fastest, other_is_faster

# oneDNN takes longer to begin than MKL does: weights of fewer elements are left to `F.linear`.
SMALL = 2**17

# Elsewhere than on x86 `F.linear` does not use MKL, which this is an alternative to.
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def suits(weight: Tensor) -> bool:
    """Whether `kept_linear` multiplies with a weight, shape (out, in), in its own way."""
    return (
        ONEDNN
        and weight.dtype in OTHER_WAYS
        and _is_wanted(weight.dtype)
        and weight.device.type == "cpu"
        and weight.numel() >= SMALL
        # Tensors of other classes, such as quantised ones, multiply in a way of their own.
        and type(weight) in (Tensor, nn.Parameter)
        # Of any other layout oneDNN makes a copy, very slowly.
        and weight.is_contiguous()
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_wanted(dtype: torch.dtype) -> bool:
    """Whether PyTorch may use oneDNN, and the other way is faster at anything."""
    mine = bool(torch.backends.mkldnn.enabled)
    return mine and any(other_is_faster(torch.get_num_threads(), dtype))


def kept_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; up to rounding, its result.

    In float32 on an x86 CPU, `F.linear` calls MKL, which on some CPUs loses time where plans lead
    to: on few rows (packing the weight takes as long for 274 as for 640), on a single one (a
    matrix-vector product on one thread), and on output features that are no multiple of 8 (up to
    4/3 of the time). oneDNN, which PyTorch brings along for compiled models, does not, and is
    slower elsewhere. In bfloat16 it calls oneDNN, which for one row or a few lays out the whole
    weight anew. What multiplies is measured.
    """
    differentiable = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    plain = differentiable or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu")
    if plain or not suits(weight) or x.numel() == 0:
        return F.linear(x, weight, bias)
    # Inductor takes oneDNN's operator with frozen weights only.
    multiply = torch.ops.planner.kept_linear if torch.compiler.is_compiling() else by_fastest
    product: Tensor = multiply(x, weight, bias)
    return product


# Not by `custom_op`, whose checks take longer than a product of a decoded token.
torch.library.define("planner::kept_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("planner::kept_linear", "cpu", by_fastest)


@torch.library.register_fake("planner::kept_linear")  # type: ignore[untyped-decorator]
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """As PyTorch's counter has it for every other product."""
    return 2 * x.numel() * weight[0]


register_flop_formula(torch.ops.planner.kept_linear)(_flops)
if ONEDNN:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
