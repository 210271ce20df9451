"""How a policy learns from the plans that it drew: by how good each turned out to be.

    method = parse("grpo:clip=0.2,kl=0.01")
    loss = method.loss(tried)

A plan is a sequence of draws: a token count, image tokens, switches. Its probability is the product
of its draws' (Plackett-Luce, `sequential_draws`), and all of its draws share its reward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from planner.planning.selectors.arguments import (
    Arguments,
    NotNegative,
    Positive,
    Several,
    read_named,
)


@dataclass(frozen=True, eq=False)
class Tried:
    """Plans that were drawn for a batch of prompts, and what came of them."""

    # Shape (plans, prompts, draws), differentiable: of each draw now, 0 for none.
    log_chances: Tensor
    drawn_with: Tensor  # the same when it was drawn
    reference: Tensor | None  # the same under the policy to stay close to; None where there is none
    rewards: Tensor  # shape (plans, prompts)
    values: Tensor  # shape (prompts,), differentiable: the reward that a critic expects


@dataclass(frozen=True)
class PolicyMethod(Arguments):
    """Turns what was tried into a loss."""

    # Weight of the divergence from the reference policy, summed over a plan's draws, by the
    # estimator r - 1 - log r of positive values (Schulman, "Approximating KL Divergence").
    kl: NotNegative = field(default=0.0, kw_only=True)
    epochs: Several = field(default=1, kw_only=True)  # updates for each set of plans tried

    def loss(self, tried: Tried) -> Tensor:
        """To be minimised; a scalar."""
        loss = self.objective(tried)
        if self.kl and tried.reference is not None:
            ratio = tried.reference - tried.log_chances
            loss = loss + self.kl * (ratio.exp() - 1 - ratio).sum(-1).mean()
        return loss

    @abstractmethod
    def objective(self, tried: Tried) -> Tensor:
        """The loss without the divergence."""


@dataclass(frozen=True)
class Reinforce(PolicyMethod):
    """REINFORCE with leave-one-out baselines (Kool et al., 2019, "Buy 4 REINFORCE samples").

    A plan's reward is held against the mean of the other plans of its prompt.
    """

    name: ClassVar[str] = "reinforce"

    @override
    def objective(self, tried: Tried) -> Tensor:
        plans = len(tried.rewards)
        others = (tried.rewards.sum(0) - tried.rewards) / max(1, plans - 1)
        advantages = tried.rewards - others if plans > 1 else tried.rewards
        return -(advantages * tried.log_chances.sum(-1)).mean()


def _clipped(tried: Tried, advantages: Tensor, clip: float) -> Tensor:
    """PPO's surrogate, draw by draw, (plans, prompts, draws) summed to a mean over plans."""
    ratio = (tried.log_chances - tried.drawn_with).exp()
    held = ratio.clamp(1 - clip, 1 + clip)
    each = torch.minimum(ratio * advantages[..., None], held * advantages[..., None])
    return -torch.where(tried.drawn_with < 0, each, 0).sum(-1).mean()


@dataclass(frozen=True)
class GRPO(PolicyMethod):
    """Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300, section 4.1).

    Rewards are normalised over the plans of a prompt, and ratios clipped as in PPO.
    """

    name: ClassVar[str] = "grpo"
    clip: Positive = 0.2

    @override
    def objective(self, tried: Tried) -> Tensor:
        centred = tried.rewards - tried.rewards.mean(0)
        spread = centred.square().mean(0).sqrt()
        return _clipped(tried, centred / (spread + 1e-4), self.clip)


@dataclass(frozen=True)
class PPO(PolicyMethod):
    """Proximal policy optimisation (Schulman et al., arXiv 1707.06347) of one-step episodes.

    The advantage is the reward less what a critic expects of the prompt and its budget, normalised
    over the batch; the critic learns by squared error.
    """

    name: ClassVar[str] = "ppo"
    clip: Positive = 0.2
    value: Positive = 0.5  # weight of the critic's error
    epochs: Several = field(default=4, kw_only=True)

    @override
    def objective(self, tried: Tried) -> Tensor:
        surprise = tried.rewards - tried.values
        advantages = surprise.detach()
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-4)
        error = surprise.square().mean()
        return _clipped(tried, advantages, self.clip) + self.value * error


@dataclass(frozen=True)
class Imitation(PolicyMethod):
    """Imitates, of the plans that were tried for a prompt, the one that turned out best."""

    name: ClassVar[str] = "imitation"

    @override
    def objective(self, tried: Tried) -> Tensor:
        best = tried.rewards.argmax(0, keepdim=True)
        return -tried.log_chances.sum(-1).gather(0, best).mean()


METHODS: Mapping[str, type[PolicyMethod]] = {
    "reinforce": Reinforce,
    "grpo": GRPO,
    "ppo": PPO,
    "imitation": Imitation,
}


def parse(text: str) -> PolicyMethod:
    """Read a method, for example ``grpo:clip=0.2``; InputError says what is wrong."""
    return read_named(text, METHODS, "way to train a policy")
