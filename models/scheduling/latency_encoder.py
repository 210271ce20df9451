"""The budget as a token: AdaLLaVA's latency encoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 128
BASE = 10000


def sinusoid(level: Tensor, steps: int) -> Tensor:
    """Sines and cosines of a budget, shape (batch, 256), float32.

    AdaLLaVA (arXiv 2503.10905), section 3.5 and its reference code: x = 2 pi k / (K + 1) at
    frequencies 10000^(-i / 128). Where switches differ in cost, k is K times the share of their
    cost that may be on, which with equal costs is the same.

    Args:
        level: k, how much is switched on, from 0 to `steps`; shape (batch,).
        steps: K, how many switches there are.
    """
    exponents = torch.arange(FREQUENCIES, device=level.device, dtype=torch.float32) / FREQUENCIES
    angle = (2 * math.pi / (steps + 1)) * level.float()[:, None] * float(BASE) ** -exponents
    return torch.cat([angle.sin(), angle.cos()], -1)


class LatencyEncoder(nn.Module):
    """LayerNorm, Linear(256, width), GELU, Linear(width, width) on the sinusoid of a budget.

    Args:
        width: hidden size of the decoder.
        steps: K, see `sinusoid`.
    """

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.norm = nn.LayerNorm(2 * FREQUENCIES)
        self.first = nn.Linear(2 * FREQUENCIES, width)
        self.second = nn.Linear(width, width)

    def forward(self, level: Tensor) -> Tensor:
        """Latency tokens, shape (batch, width), for budgets of shape (batch,)."""
        features = self.norm(sinusoid(level, self.steps).to(self.norm.weight.dtype))
        token: Tensor = self.second(nn.functional.gelu(self.first(features)))
        return token
