"""Sampling of AdaLLaVA-H's units: a layer's best heads together with its best MLP groups."""

from __future__ import annotations

import torch
from torch import Tensor

from planner.models.scheduling import UnitSwitches

__all__ = ["draw_units"]


def draw_units(
    layout: UnitSwitches, logits: Tensor, limits: Tensor, noise: Tensor, temperature: float
) -> Tensor:
    """Units drawn one after the other, with a straight-through gradient.

    AdaLLaVA (arXiv 2503.10905), section 3.4: at every draw the logits get fresh Gumbel noise, and
    the unit that `UnitSwitches.next_unit` finds among what is left is taken. The relaxation of a
    draw is the softmax of the noisy logits that are left, times the switches in a unit; the paper
    describes it for single switches and leaves units open.

    Args:
        layout: what the logits stand for.
        logits: shape (batch, size).
        limits: shape (batch,): units to draw.
        noise: shape (draws, batch, size), standard Gumbel; at least as many draws as the limits.
        temperature: of the softmax; 5 in the paper.

    Returns:
        Shape (batch, size): 0 and 1, with the relaxation's gradient.
    """
    taken = torch.zeros_like(logits, dtype=torch.bool)
    soft = torch.zeros_like(logits)
    for step in range(int(limits.max())):
        noisy = (logits + noise[step]) / temperature
        active = (step < limits)[:, None]
        # Rows that are through keep something finite for the softmax; it counts nothing.
        left = noisy.masked_fill(taken & active, -torch.inf)
        soft = soft + active * 2 * layout.rank * left.softmax(-1)
        taken = taken | (layout.next_unit(noisy, taken & active) & active)
    hard = taken.to(logits.dtype)
    return hard - soft.detach() + soft
