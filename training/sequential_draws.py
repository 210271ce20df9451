"""Switches drawn one after the other while any fits, and how likely an order of draws is.

At every draw the candidates are the switches that are not taken and fit what is left. If they are
drawn in proportion to exp(logit), orders of switches have the Plackett-Luce distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.training.switch_costs import Costs


@dataclass(frozen=True, eq=False)
class Turn:
    """One draw for every sample that still has candidates.

    Attributes:
        candidates: shape (batch, switches), bool: not taken, and fitting what is left.
        active: shape (batch,), bool: whether the sample has candidates.
        pick: shape (batch,), int64: the switch taken, where active.
        taken: shape (batch, switches), bool: after the draw.
    """

    candidates: Tensor
    active: Tensor
    pick: Tensor
    taken: Tensor


def turns(
    choose: Callable[[Tensor], Tensor], taken: Tensor, costs: Costs, limits: Tensor
) -> Iterator[Turn]:
    """Take one switch after the other while any fits, in all samples at once.

    Args:
        choose: candidates (batch, switches) -> one of them for each sample, (batch,).
        taken: shape (batch, switches), bool: on at the start, and not charged to the limits.
        costs: of the switches.
        limits: shape (batch,).
    """
    check_limits(limits)
    left = limits.to(taken.device, torch.int64)
    while True:
        price = costs.of_next(taken)
        candidates = ~taken & (price <= left[:, None])
        active = candidates.any(-1)
        if not active.any():
            return
        pick = choose(candidates)
        chosen = torch.zeros_like(taken).scatter(1, pick[:, None], active[:, None])
        taken = taken | chosen
        left = left - torch.where(chosen, price, 0).sum(-1)
        yield Turn(candidates, active, pick, taken)


def check_limits(limits: Tensor) -> None:
    """Raise InputError if a limit is negative."""
    if (limits < 0).any():
        raise InputError(f"a limit of {int(limits.min())} leaves nothing to choose")


def by_rank(order: Tensor) -> Callable[[Tensor], Tensor]:
    """Choose the candidate that comes first in an order of switches, (batch, switches)."""
    rank = order.argsort(-1)
    last = order.shape[-1]
    return lambda candidates: rank.masked_fill(~candidates, last).argmin(-1)


def log_chance(scores: Tensor, turn: Turn) -> Tensor:
    """Log-probability of a turn's picks, 0 for samples without candidates; shape (batch,)."""
    out = turn.active[:, None] & ~turn.candidates
    chances = scores.masked_fill(out, -torch.inf).log_softmax(-1)
    return torch.where(turn.active, chances.gather(1, turn.pick[:, None])[:, 0], 0)


def log_probability(order: Tensor, logits: Tensor, costs: Costs, limits: Tensor) -> Tensor:
    """Log-probability that `GumbelSequential` draws switches in an order (Plackett-Luce).

    At every draw, the log-softmax of the logits over the candidates. Policy gradients need it under
    logits other than those that the order was drawn from.

    Args:
        order: shape (batch, draws), as in `Drawn`.
        logits: shape (batch, switches).
        costs: that the order was drawn with.
        limits: that it was drawn with, shape (batch,).

    Returns:
        Shape (batch,), differentiable.
    """
    scores = logits.float()
    columns = iter(order.unbind(1))
    taken = torch.zeros_like(scores, dtype=torch.bool)
    total = scores.new_zeros(len(scores))
    for turn in turns(lambda _: next(columns).clamp(min=0), taken, costs, limits):
        total = total + log_chance(scores, turn)
    return total
