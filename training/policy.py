"""A scheduler as a policy: plans are drawn, carried out, rewarded, and learned from.

The model is frozen and its prompts come with answers. For each prompt a few sets of image tokens
are drawn, and for each set a few sets of switches; all of them keep to the prompt's budget, as
draws that do not fit are not candidates. Pictures are encoded once, and the layers that always run
are run once for each set of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.running.layer_results import hidden_of
from planner.models.running.patches import Patches
from planner.models.scheduling import Scheduler, UnifiedSwitches
from planner.models.scheduling.token_choice import ChosenTokens, kept_counts, picked
from planner.models.scheduling.vision_controller import TokenScores
from planner.models.tokens.selectors import DecoderInputs
from planner.training.adallava import AdaptiveModel, last_answer
from planner.training.data.packing import IGNORE
from planner.training.estimators import GumbelSequential
from planner.training.policy_methods import PolicyMethod, Tried
from planner.training.sequential_draws import log_chances
from planner.training.switch_costs import costs_of
from planner.training.token_draws import token_costs
from planner.training.trainer import RunTrainer
from planner.training.warm_start import Decided, stop

# Multiplied with the number of a draw, to have noise of its own from a sample's seed.
_SALT = 7919


@dataclass(frozen=True)
class Reward:
    """What a plan is worth to a prompt with a known answer."""

    # ``nll``, the mean log-likelihood of the answer's tokens, or ``correct``, whether each of them
    # is the most likely one.
    kind: str = "nll"
    # Taken off for all of the base model's cost, and in proportion for less.
    flops_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("nll", "correct"):
            raise InputError(f"unknown reward '{self.kind}': choose nll or correct")

    def of(self, logits: Tensor, labels: Tensor, costs: Tensor) -> Tensor:
        """Shape (batch,), of logits (batch, tokens, words), labels and costs as shares (batch,)."""
        wanted = labels[:, 1:]
        answered = wanted != IGNORE
        chances = logits[:, :-1].float().log_softmax(-1)
        if self.kind == "nll":
            found = chances.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
            found = (found * answered).sum(-1) / answered.sum(-1).clamp(min=1)
        else:
            found = ((chances.argmax(-1) == wanted) | ~answered).all(-1).float()
        return found - self.flops_penalty * costs


@dataclass(eq=False)
class TokenDraw:
    """Image tokens that were drawn for a batch, and the sets of switches drawn behind them."""

    chosen: ChosenTokens | None  # what is kept; None where there is no vision side
    # Shape (batch, draws), int64: tokens in the order drawn, -1 after the last.
    order: Tensor | None
    switches: list[Tensor]  # the same for each set of switches


class PolicyTrainer(RunTrainer):
    """Makes several updates for each batch of plans tried, where the method asks for it."""

    @override
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        policy: Any = self.accelerator.unwrap_model(model)
        policy.forget()
        for _ in range(policy.method.epochs - 1):
            super().training_step(model, dict(inputs), num_items_in_batch)
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            assert self.optimizer is not None
            self.optimizer.step()
            model.zero_grad()
        return super().training_step(model, inputs, num_items_in_batch)


class PolicyModel(AdaptiveModel):
    """A frozen model whose scheduler learns from the plans that it draws.

    Args:
        model: stock; its weights get no gradient.
        scheduler: what learns. The policy to stay close to is this one as it is now.
        tokens: sets of image tokens drawn for a prompt.
        switches: sets of switches drawn for each.
    """

    trainer: ClassVar[type[RunTrainer]] = PolicyTrainer

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        scheduler: Scheduler,
        method: PolicyMethod,
        reward: Reward,
        *,
        tokens: int = 2,
        switches: int = 2,
        load: Workload | None = None,
    ) -> None:
        super().__init__(model, graph, scheduler, GumbelSequential(), load)
        if not isinstance(self.layout, UnifiedSwitches):
            raise InputError(
                f"a policy needs the switches of a unified controller, not {self.layout.name}: "
                f"tokens,{self.layout.name}:scorer=all leaves the image tokens alone"
            )
        model.requires_grad_(False)
        # With the sum of the plans' rewards.
        self.tally = torch.zeros(4, dtype=torch.float64)
        self.method, self.reward = method, reward
        self.sets = (tokens if self.layout.has_vision else 1, switches)
        self.reference = deepcopy(scheduler).requires_grad_(False)
        self.critic = nn.Linear(1 if scheduler.vision is None else scheduler.vision.summary, 1)
        self._tried: tuple[list[TokenDraw], Tensor, Tensor, Tensor | None] | None = None
        self._draw_of: TokenDraw | None = None
        self._number = 0
        self._forced: Any = None
        self._lower = self.scheduled.always_run

    def forget(self) -> None:
        """Draw plans anew in the next pass."""
        self._tried = None

    @property
    @override
    def accepts_loss_kwargs(self) -> bool:
        return False

    @override
    def forward(self, labels: Tensor, limits: Tensor, seeds: Tensor, **inputs: Any) -> Any:
        """The method's loss on plans for a batch, as `AdaptiveModel.forward` takes it."""
        self.scheduled.at = last_answer(labels)
        self.scheduled.limits = limits
        self._seeds = seeds
        inputs = {**inputs, "use_cache": False}
        with pictures_once(self.model):
            if self._tried is None:
                self._tried = self._try(labels, inputs)
            draws, rewards, drawn_with, reference = self._tried
            now, values = self._chances(draws, inputs, self.scheduler)
        return {"loss": self.method.loss(Tried(now, drawn_with, reference, rewards, values))}

    # -- drawing -----------------------------------------------------------------------------

    @torch.no_grad()
    def _try(
        self, labels: Tensor, inputs: dict[str, Any]
    ) -> tuple[list[TokenDraw], Tensor, Tensor, Tensor | None]:
        """Plans, their rewards (plans, prompts), and what each draw's chance was."""
        draws: list[TokenDraw] = []
        rewards = []
        self.scheduled.decide, self.scheduled.decide_tokens = self._sample, self._sample_tokens
        for _ in range(self.sets[0]):
            self._draw_of = None
            with _lower_layers_once(self._lower):
                for _ in range(self.sets[1]):
                    self._number += 1
                    logits = self.model(**inputs).logits
                    rewards.append(self.reward.of(logits, labels, self._shares()))
                    self.tally[3] += rewards[-1].sum()
            assert self._draw_of is not None
            draws.append(self._draw_of)
        self._number = 0
        drawn_with, _ = self._chances(draws, inputs, self.scheduler)
        reference = None
        if self.method.kl:
            reference, _ = self._chances(draws, inputs, self.reference)
        return draws, torch.stack(rewards), drawn_with, reference

    def _noise(self) -> list[torch.Generator]:
        assert self._seeds is not None
        return [
            torch.Generator().manual_seed(int(seed) + _SALT * self._number) for seed in self._seeds
        ]

    def _sample_tokens(
        self, scores: TokenScores, limits: Tensor, inputs: DecoderInputs
    ) -> ChosenTokens:
        if self._draw_of is not None:
            assert self._draw_of.chosen is not None
            return self._draw_of.chosen
        layout, image = self._unified, scores.image
        sampler, noise = GumbelSequential(), self._noise()
        logits = scores.counts.masked_fill(~layout.open_counts(limits), -torch.inf)
        options = torch.stack(
            [
                torch.multinomial(row.softmax(-1).cpu(), 1, generator=each)[0]
                for row, each in zip(logits, noise, strict=True)
            ]
        ).to(image.device)
        order = None
        if layout.learns_tokens:
            counts = kept_counts(layout, options, image)
            drawn = sampler.draw(scores.tokens, token_costs(image), counts, noise)
            keep, order = ~image | drawn.taken, drawn.order
        else:
            keep = picked(layout, scores.tokens, options, inputs)
        chosen = ChosenTokens(options, keep)
        self._draw_of = TokenDraw(chosen, order, [])
        return chosen

    def _sample(self, logits: Tensor, limits: Tensor) -> Tensor:
        if self._draw_of is None:
            self._draw_of = TokenDraw(None, None, [])
        chosen = self._draw_of.chosen
        costs = costs_of(self._unified, None if chosen is None else chosen.options)
        drawn = GumbelSequential().draw(logits, costs, limits, self._noise())
        assert drawn.order is not None
        self._draw_of.switches.append(drawn.order)
        return drawn.taken

    def _shares(self) -> Tensor:
        """What the plans of the last pass cost, as shares of everything; noted for the log."""
        layout, rows = self._unified, self.scheduled.decisions.pop()
        spent = [layout.spent(row) for row in rows]
        for used, limit in zip(spent, self.scheduled.limits.tolist(), strict=True):
            told = [1, layout.utilisation([used], limit), used > limit]
            self.tally[:3] += torch.tensor(told, dtype=self.tally.dtype)
        return (torch.tensor(spent) + layout.always) / (layout.steps + layout.always)

    @property
    def _unified(self) -> UnifiedSwitches:
        assert isinstance(self.layout, UnifiedSwitches)
        return self.layout

    @override
    def summary(self, tally: Tensor) -> dict[str, float]:
        reward = float(tally[3] / tally[0].clamp(min=1))
        return super().summary(tally[:3]) | {"reward": reward}

    # -- chances -----------------------------------------------------------------------------

    def _chances(
        self, draws: Sequence[TokenDraw], inputs: dict[str, Any], policy: Scheduler
    ) -> tuple[Tensor, Tensor]:
        """(log-probability of every draw (plans, prompts, draws), expected rewards (prompts,))."""
        scheduled = self.scheduled
        rows: list[Tensor] = []
        own = scheduled.scheduler
        scheduled.decide = stop
        scheduled.decide_tokens = lambda *_: self._forced
        try:
            scheduled.scheduler = policy
            for draw in draws:
                self._forced = draw.chosen
                try:
                    self.model(**inputs)
                except Decided as decided:
                    logits = decided.args[0]
                limits = scheduled.limits
                rows += plan_chances(self._unified, draw, scheduled.scores, logits, limits)
        finally:
            scheduled.scheduler = own
        longest = max(row.shape[1] for row in rows)
        padded = [nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows]
        scores = scheduled.scores
        batch = len(scheduled.limits)
        told = padded[0].new_zeros(batch, 1) if scores is None else scores.summary.detach()
        return torch.stack(padded), self.critic(told.to(self.critic.weight.dtype))[:, 0]


def plan_chances(
    layout: UnifiedSwitches,
    draw: TokenDraw,
    scores: TokenScores | None,
    logits: Tensor,
    limits: Tensor,
) -> Iterator[Tensor]:
    """Log-probability of every draw of plans, (prompts, draws) for each set of switches.

    Args:
        draw: the plans, which have their image tokens in common.
        scores: of the vision side; None without one.
        logits: of the switches, shape (prompts, size).
        limits: of the prompts, shape (prompts,).
    """
    parts, options, left = [], None, limits
    if draw.chosen is not None:
        assert scores is not None
        options = draw.chosen.options
        left = layout.left(limits, options)
        counts = scores.counts.masked_fill(~layout.open_counts(limits), -torch.inf)
        parts.append(counts.log_softmax(-1).gather(1, options[:, None]))
        if draw.order is not None:
            kept = kept_counts(layout, options, scores.image)
            price = token_costs(scores.image)
            parts.append(log_chances(draw.order, scores.tokens, price, kept))
    costs = costs_of(layout, options)
    for order in draw.switches:
        yield torch.cat([*parts, log_chances(order, logits, costs, left)], 1)


@contextmanager
def pictures_once(model: nn.Module, known: dict[Any, Any] | None = None) -> Iterator[None]:
    """Encode pictures in the first of several passes over them, and keep what came out in `known`.

    Pictures are told apart by the tensor that holds them.
    """
    kept: dict[Any, Any] = {} if known is None else known

    def remembered(module: Any) -> Callable[..., Any]:
        stock = module.get_image_features

        def features(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
            key = module, id(pixel_values)
            if key not in kept:
                with torch.no_grad():
                    # The tensor too, or another could come to have its id.
                    kept[key] = pixel_values, stock(pixel_values, *args, **kwargs)
            return kept[key][1]

        return features

    with Patches() as patches:
        for module in model.modules():
            if hasattr(type(module), "get_image_features"):
                patches.set(module, "get_image_features", remembered(module))
        yield


@contextmanager
def _lower_layers_once(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Run layers in the first of several passes over a batch, and pass on what they gave."""

    def remembered(module: Any) -> Callable[..., Any]:
        stock = module.forward
        known: list[Tensor] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not known:
                known.append(hidden_of(stock(*args, **kwargs)))
            return known[0]

        return forward

    with Patches() as patches:
        for module in layers:
            patches.set(module, "forward", remembered(module))
        yield
