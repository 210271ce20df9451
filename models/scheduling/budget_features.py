"""A budget as numbers that a network can read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from planner.planning.selectors.in_decoder import BUDGET_FEATURES

FREQUENCIES = BUDGET_FEATURES // 2
BASE = 10000


def sinusoid(level: Tensor, steps: int) -> Tensor:
    """Sines and cosines of a budget, shape (batch, 256), float32.

    AdaLLaVA (arXiv 2503.10905), section 3.5 and its reference code: x = 2 pi k / (K + 1) at
    frequencies 10000^(-i / 128). Where switches differ in cost, k is K times the share of their
    cost that may be on, which with equal costs is the same.

    `level`: k, how much is switched on, from 0 to `steps`; shape (batch,). `steps`: K, how many
    switches there are.
    """
    exponents = torch.arange(FREQUENCIES, device=level.device, dtype=torch.float32) / FREQUENCIES
    angle = (2 * math.pi / (steps + 1)) * level.float()[:, None] * float(BASE) ** -exponents
    return torch.cat([angle.sin(), angle.cos()], -1)
