"""Random weights and plans for the kernel tests, and how closeness is measured."""

from __future__ import annotations

import torch
from torch import Tensor

# Root-mean-square error over root-mean-square value, against float64. Half precision rounds the
# inputs of each product and its result: a few times 2^-9 (bf16) or 2^-12 (fp16).
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}


def error_ratio(got: Tensor, want: Tensor) -> float:
    """Relative error; NaN or infinity anywhere makes it so too."""
    got, want = got.double(), want.double()
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    ratio = error_ratio(got, want)
    assert ratio < TOLERANCE[dtype], ratio


def weight(out: int, inner: int) -> Tensor:
    return torch.randn(out, inner) / inner**0.5


def random_lanes(total: int, count: int | None = None) -> list[int]:
    """Distinct lanes of a site, at random: `count`, or any number from 1."""
    count = int(torch.randint(1, total + 1, ())) if count is None else count
    return sorted(torch.randperm(total)[:count].tolist())
