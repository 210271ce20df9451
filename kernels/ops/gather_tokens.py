"""The tokens that are left of each sample, side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from planner.kernels.ops.registration import Gradients, Op

__all__ = ["gather_tokens", "naive_gather_tokens", "op"]


def gather_tokens(x: Tensor, index: Tensor, *, triton: bool) -> Tensor:
    """Rows of x by index, exactly. Differentiable in x.

    Args:
        x: (batch, tokens, width).
        index: (batch or 1, picked): places, each sample its own.
        triton: whether Triton computes it, or PyTorch.

    Returns:
        (batch, picked, width).
    """
    return op(x, index, triton=triton)


def naive_gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The twin."""
    return torch.stack([x[row, places] for row, places in enumerate(index.expand(len(x), -1))])


def _forward(x: Tensor, index: Tensor, triton: bool) -> Tensor:
    if not triton:
        return torch.take_along_dim(x, index[:, :, None], dim=1)
    from planner.kernels.triton.gather_tokens import gather_tokens as kernel

    return kernel(x, index)


def _fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], index.shape[1], x.shape[2])


def _backward(gradient: Tensor, wanted: list[str], x: Tensor, index: Tensor) -> Gradients:
    place = index[:, :, None].expand_as(gradient)
    return {"x": torch.zeros_like(x).scatter_add(1, place, gradient)}


op = Op(
    "gather_tokens",
    "Tensor x, Tensor index",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    survivors=False,
)
