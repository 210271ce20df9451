"""Products with the rows and columns that are left of a weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FEW", "SMALL", "VECTOR", "kept_linear"]

# Rows of a product on the CPU start at multiples of this many floats.
VECTOR = 8
# Fewer rows than this are multiplied from the other side, unless the weight has fewer elements
# than that: turning them round takes some operators more.
FEW = 8
SMALL = 2**16

MKL = torch.backends.mkl.is_available()


def kept_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, in the order and layout that suit MKL; up to rounding, its result.

    In float32 on the CPU, `F.linear` is slow in two places that cut weights lead to:

    - Decoding, fewer than `FEW` rows. One row is a matrix-vector product, which runs on one thread
      and loses more the shorter the weight's rows are: 1024 outputs take 0.28 ms of 1024 inputs and
      still 0.20 ms of 512. The weight times the inputs, on two threads, takes 0.14 and 0.08 ms.
    - More rows, where the output features are no multiple of 8: up to 4/3 of the time (1024 inputs,
      2236 outputs, 640 rows). With a gap behind each row of the output it is not.

    Args:
        x: shape (..., in).
        weight: shape (out, in).
        bias: shape (out,), or None.

    Returns:
        Shape (..., out); there may be gaps between rows.
    """
    rows, width = x.shape[:-1].numel(), weight.shape[0]
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if 0 < rows < FEW and weight.numel() >= SMALL and MKL and _is_threaded():
        return _turned(x, weight, bias)
    differentiable = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if rows > 1 and width % VECTOR and not differentiable and not torch.compiler.is_compiling():
        return _spaced(x, weight, bias)
    return F.linear(x, weight, bias)


@torch.compiler.assume_constant_result
def _is_threaded() -> bool:
    return torch.get_num_threads() > 1


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As the weight times the inputs; a single row is given twice, or MKL would take one thread."""
    inputs = x.flatten(end_dim=-2) if x.ndim > 1 else x[None]
    single = inputs.shape[0] == 1
    columns = (torch.cat((inputs, inputs)) if single else inputs).t()
    if bias is None:
        product = torch.mm(weight, columns)
    else:
        product = torch.addmm(bias[:, None], weight, columns)
    rows = product[:, 0] if single else product.t()
    return rows.contiguous().view(*x.shape[:-1], weight.shape[0])


def _spaced(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each row of the output on whole vectors."""
    width = weight.shape[0]
    spaced = x.new_empty(*x.shape[:-1], width - width % -VECTOR)[..., :width]
    rows, out = x.flatten(end_dim=-2), spaced.flatten(end_dim=-2)
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)
    return spaced
