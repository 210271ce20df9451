"""Estimators: how a scheduler's logits become switches, and how gradients get back through them.

At inference there is no noise, and the scheduler's layout decides; docs/estimators.md compares all.

A switch is a candidate as long as its cost fits what is left of the limit, and draws go on until
there is no candidate. So every sample keeps to its limit and leaves no room for another switch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from planner.ir.errors import InputError
from planner.planning.selectors.arguments import (
    Arguments,
    NotNegative,
    Positive,
    Several,
    read_named,
)
from planner.training.sequential_draws import (
    best_draws,
    check_limits,
    draws,
    log_chance,
    take_best,
)
from planner.training.subset_distributions import Subsets
from planner.training.switch_costs import AdditiveCosts, Costs

# A generator on the device of the logits, or one for every sample, on any device: what is drawn for
# a sample then does not depend on its batch.
Noise = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True, eq=False)
class Drawn:
    """Sampled switches."""

    # Shape (batch, switches), 0 or 1 in value; the estimator's gradient flows through.
    gates: Tensor
    # Shape (batch,), differentiable: of `order`, or of the set `taken` if there is no order; None
    # if the estimator does not know it.
    log_probability: Tensor | None = None
    # Shape (batch, draws), int64: switches in the order drawn, -1 after the last; None if they were
    # not drawn one by one.
    order: Tensor | None = None

    @property
    def taken(self) -> Tensor:
        """The gates as bool."""
        return self.gates > 0.5


@dataclass(frozen=True)
class Estimator(Arguments):
    """Samples switches under limits; read from, and written as, ``gumbel:temperature=5``."""

    @abstractmethod
    def draw(self, logits: Tensor, costs: Costs, limits: Tensor, noise: Noise = None) -> Drawn:
        """Sample switches, for training.

        `logits`: shape (batch, switches). `limits`: shape (batch,), int64: what every sample may
        spend.

        Raises InputError: a limit is negative, or the estimator cannot work with such costs.
        """

    def noisy(self, scores: Tensor, noise: Noise) -> Tensor:
        """Scores, shape (batch, n), with the Gumbel noise by which the best of them is drawn."""
        return scores + gumbel(scores, noise)


def _prices(costs: Costs, user: str, like: Tensor) -> Tensor:
    """Of costs that add up, shape (batch, switches), int64."""
    if not isinstance(costs, AdditiveCosts):
        raise InputError(f"{user} needs costs that add up")
    return costs.prices.to(like.device).expand(like.shape)


def gumbel(like: Tensor, noise: Noise) -> Tensor:
    """Standard Gumbel noise in float32, which is -log of exponential noise."""
    drawn = _random(like, like.shape[1], noise, Tensor.exponential_, torch.float32)
    return -drawn.clamp_(min=torch.finfo(torch.float32).tiny).log()


def _random(
    like: Tensor, columns: int, noise: Noise, fill: Callable[..., Tensor], dtype: torch.dtype
) -> Tensor:
    """Rows of noise for the rows of `like`, on its device: `fill` is, say, `Tensor.uniform_`."""
    if isinstance(noise, Sequence):
        rows = [
            fill(torch.empty(columns, dtype=dtype, device=each.device), generator=each)
            for each in noise
        ]
        return torch.stack(rows).to(like.device)
    empty = torch.empty((len(like), columns), dtype=dtype, device=like.device)
    return fill(empty, generator=noise)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard` in value, exactly; the gradient of `soft`."""
    return hard.to(soft) + (soft - soft.detach())


@dataclass(frozen=True)
class GumbelSequential(Estimator):
    """AdaLLaVA's sampling (arXiv 2503.10905, sections 3.3 and 3.4 and supplement).

    Switches are drawn one after the other, each time with fresh Gumbel noise and with the switches
    already drawn at -inf. Every draw is one-hot, with the gradient of its softmax (Jang et al.,
    arXiv 1611.01144), and the gates are the sum of the draws.
    """

    name: ClassVar[str] = "gumbel"
    temperature: Positive = 5.0  # of the softmax; it does not change what is drawn
    # How much of the noise there is; without any, what is drawn is what is decided at inference.
    noise: NotNegative = 1.0

    @override
    def noisy(self, scores: Tensor, noise: Noise) -> Tensor:
        return scores + self.noise * gumbel(scores, noise)

    @override
    def draw(self, logits: Tensor, costs: Costs, limits: Tensor, noise: Noise = None) -> Drawn:
        scores = logits.float()
        taken = torch.zeros_like(scores, dtype=torch.bool)
        soft = 0 * scores  # a function of the logits even where nothing is drawn
        noisy = scores

        def choose(candidates: Tensor) -> Tensor:
            nonlocal noisy
            noisy = self.noisy(scores, noise)
            return noisy.detach().masked_fill(~candidates, -torch.inf).argmax(-1)

        total = soft.sum(-1)
        picks = []
        for draw in draws(choose, taken, costs, limits):
            taken = draw.taken
            soft = soft + _softmax(noisy / self.temperature, draw.candidates)
            if self.noise:
                total = total + log_chance(scores / self.noise, draw)
            picks.append(draw.pick.masked_fill(~draw.active, -1))
        order = torch.stack(picks, 1) if picks else taken.new_zeros((len(taken), 0)).long()
        return Drawn(straight_through(taken, soft), total, order)

    def draw_units(
        self, logits: Tensor, limits: Tensor, heads: int, unit: int, noise: Noise = None
    ) -> Tensor:
        """Gates of AdaLLaVA-H: at every draw a layer, and some of its heads and MLP groups.

        As the authors' code has it; the paper leaves it open. The layer is that of the best noisy
        logit that is left. Then, with fresh noise, the best heads and the best groups of that layer
        that are left are drawn. The layer and what is drawn inside are straight-through each by
        itself, and a gate is their product; through the layer, so are the logits inside.

        Args:
            logits: shape (batch, layers * 2 * heads), by layer, heads before groups.
            limits: shape (batch,), of units.
            heads: of a layer, which are as many as groups.
            unit: heads, and groups, that a draw takes.
        """
        shape = len(logits), -1, 2, heads
        scores = logits.float().view(shape)
        gates = 0 * scores  # a function of the logits even where nothing is drawn

        def noisy(values: Tensor, out: Tensor) -> Tensor:
            """Shape (batch, switches)."""
            flat = values.flatten(1)
            noised = self.noisy(flat, noise) / self.temperature
            return noised.masked_fill(out.flatten(1), -torch.inf)

        for step in range(int(limits.max()) if len(limits) else 0):
            active = (step < limits.to(logits.device))[:, None, None, None]
            # Rows that are through keep something finite for the softmax; it counts nothing.
            taken = (gates.detach() > 0.5) & active
            left = noisy(scores, taken)
            drawn = left.argmax(-1) // (2 * heads)
            chosen = nn.functional.one_hot(drawn, scores.shape[1]).bool()
            layer = straight_through(chosen, left.softmax(-1).view(shape).sum((2, 3)))
            here = (taken & chosen[:, :, None, None]).any(1)
            members = (layer[:, :, None, None] * scores).sum(1)
            left = noisy(members, here).view_as(members)
            best = left.topk(unit, -1).indices
            kept = torch.zeros_like(here).scatter(-1, best, True)
            inside = straight_through(kept, left.softmax(-1))
            gates = gates + active * layer[:, :, None, None] * inside[:, None]
        return gates.flatten(1)


def _softmax(scores: Tensor, among: Tensor) -> Tensor:
    """Softmax over some switches, 0 elsewhere; rows without any are 0 throughout."""
    empty = ~among.any(-1, keepdim=True)
    shares = scores.masked_fill(~among & ~empty, -torch.inf).softmax(-1)
    return shares.masked_fill(~among, 0)


@dataclass(frozen=True)
class GumbelTopK(Estimator):
    """The best switches that fit under one Gumbel noise, with the gradient of a relaxed top-k.

    The best k under Gumbel noise are a sample without replacement (Kool et al., arXiv 1903.06059).
    The gradient is that of k softmaxes; after each of them, log(1 - p) is added to the logits, to
    push down what was taken with probability p (Xie and Ermon, arXiv 1901.10517, section 4).
    """

    name: ClassVar[str] = "gumbel-topk"
    temperature: Positive = 1.0  # of the relaxation; it does not change what is drawn

    @override
    def draw(self, logits: Tensor, costs: Costs, limits: Tensor, noise: Noise = None) -> Drawn:
        scores = logits.float()
        keys = scores + gumbel(scores, noise)
        taken = torch.zeros_like(scores, dtype=torch.bool)
        soft = 0 * scores  # a function of the logits even where nothing is drawn
        tiny = torch.finfo(scores.dtype).tiny
        for draw in best_draws(keys, taken, costs, limits):
            # What was taken is pushed down only as far as the relaxation took it.
            share = _softmax(keys / self.temperature, draw.candidates | taken)
            soft = soft + share
            keys = keys + (1 - share).clamp(min=tiny).log()
            taken = draw.taken
        return Drawn(straight_through(taken, soft))


@dataclass(frozen=True)
class Simple(Estimator):
    """SIMPLE (Ahmed et al., arXiv 2210.01941): exact samples, and the gradient of exact marginals.

    The distribution is that of `Subsets`. Costs must add up; the room that rounding them leaves is
    filled by logit.
    """

    name: ClassVar[str] = "simple"
    columns: Several = 1024  # largest number of steps in which a limit is counted

    @override
    def draw(self, logits: Tensor, costs: Costs, limits: Tensor, noise: Noise = None) -> Drawn:
        check_limits(limits)
        prices = _prices(costs, self.name, logits)
        subsets = Subsets.of(logits, prices, limits, self.columns)
        chance = _random(logits, logits.shape[1] + 2, noise, Tensor.uniform_, torch.float64)
        sampled = subsets.sample(chance)
        left = limits.to(logits.device) - torch.where(sampled, prices, 0).sum(-1)
        taken = take_best(logits, sampled, costs, left)
        gates = taken.float()
        if subsets.weights.requires_grad:
            gates = straight_through(taken, subsets.marginals().float())
        log_chance = subsets.log_probability(sampled).float() if subsets.exact else None
        return Drawn(gates, log_chance)


@dataclass(frozen=True)
class Deterministic(Estimator):
    """The paper's ablation (arXiv 2503.10905, section 3.3 and Table 3): a hard plan, no sampling.

    A switch is on where its logit is positive, whatever the limit; the loss has `penalty` added.
    """

    name: ClassVar[str] = "deterministic"
    weight: NotNegative = 1.0  # lambda, the weight of the penalty

    @override
    def draw(self, logits: Tensor, costs: Costs, limits: Tensor, noise: Noise = None) -> Drawn:
        return Drawn(straight_through(logits > 0, logits.float().sigmoid()))

    def penalty(self, gates: Tensor, costs: Costs, limits: Tensor) -> Tensor:
        """lambda * max(0, cost - limit) / limit, shape (batch,), differentiable; a limit of 0 is 1.

        Raises InputError: costs do not add up.
        """
        prices = _prices(costs, "the penalty", gates).double()
        limit = limits.to(prices).clamp(min=1)
        excess = ((gates.double() * prices).sum(-1) - limits.to(prices)) / limit
        return (self.weight * excess.relu()).float()


ESTIMATORS: Mapping[str, type[Estimator]] = {
    "gumbel": GumbelSequential,
    "gumbel-topk": GumbelTopK,
    "simple": Simple,
    "deterministic": Deterministic,
}


def parse(text: str) -> Estimator:
    """Read an estimator, for example ``gumbel:temperature=5``; InputError says what is wrong."""
    return read_named(text, ESTIMATORS, "estimator")
