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
class Draw:
    """One draw for every sample that still has candidates."""

    candidates: Tensor  # shape (batch, switches), bool: not taken, and fitting what is left
    active: Tensor  # shape (batch,), bool: whether the sample has candidates
    pick: Tensor  # shape (batch,), int64: the switch taken, where active
    taken: Tensor  # shape (batch, switches), bool: after the draw


def draws(
    choose: Callable[[Tensor], Tensor], taken: Tensor, costs: Costs, limits: Tensor
) -> Iterator[Draw]:
    """Take one switch after the other while any fits, in all samples at once.

    Args:
        choose: candidates (batch, switches) -> one of them for each sample, (batch,).
        taken: shape (batch, switches), bool: on at the start, and not charged to the limits.
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
        yield Draw(candidates, active, pick, taken)


def check_limits(limits: Tensor) -> None:
    """Raise InputError if a limit is negative."""
    if (limits < 0).any():
        raise InputError(f"a limit of {int(limits.min())} leaves nothing to choose")


def best_draws(scores: Tensor, taken: Tensor, costs: Costs, limits: Tensor) -> Iterator[Draw]:
    """`draws` of the switches by descending score, (batch, switches), as `costs` ranks them.

    The rule of `planner.solver.take_while_fits`.
    """
    rank = costs.ranked(scores.detach()).argsort(-1)
    last = rank.shape[-1]
    return draws(lambda c: rank.masked_fill(~c, last).argmin(-1), taken, costs, limits)


def take_best(scores: Tensor, taken: Tensor, costs: Costs, limits: Tensor) -> Tensor:
    """What is taken after `best_draws`, shape (batch, switches), bool."""
    for draw in best_draws(scores, taken, costs, limits):
        taken = draw.taken
    return taken


def log_chance(scores: Tensor, draw: Draw) -> Tensor:
    """Log-probability of a draw's picks, 0 for samples without candidates; shape (batch,)."""
    out = draw.active[:, None] & ~draw.candidates
    chances = scores.masked_fill(out, -torch.inf).log_softmax(-1)
    return torch.where(draw.active, chances.gather(1, draw.pick[:, None])[:, 0], 0)


def log_chances(order: Tensor, logits: Tensor, costs: Costs, limits: Tensor) -> Tensor:
    """Log-probability of each draw of an order by `GumbelSequential` (Plackett-Luce).

    At every draw, the log-softmax of the logits over the candidates; 0 where there is no draw.
    Policy gradients need it under logits other than those that the order was drawn from.

    Args:
        order: shape (batch, draws), as in `Drawn`.
        logits: shape (batch, switches).
        costs: that the order was drawn with.
        limits: shape (batch,), likewise.

    Returns shape (batch, draws).
    """
    scores = logits.float()
    columns = iter(order.unbind(1))
    taken = torch.zeros_like(scores, dtype=torch.bool)
    found = [
        log_chance(scores, draw)
        for draw in draws(lambda _: next(columns).clamp(min=0), taken, costs, limits)
    ]
    return torch.stack(found, 1) if found else scores[:, :0]


def log_probability(order: Tensor, logits: Tensor, costs: Costs, limits: Tensor) -> Tensor:
    """Log-probability of whole orders, shape (batch,): the sum of `log_chances`, as given those."""
    return log_chances(order, logits, costs, limits).sum(1)
