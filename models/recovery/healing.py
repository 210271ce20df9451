"""Healing: a short training under a plan towards what the base model says.

The student is the model as it runs under the plan, with the recovered weights of its sites; the
teacher is the same model without plan and changes.
The loss is KL(teacher || student) at every token (Hinton et al., arXiv 1503.02531). Trained are
either low-rank changes of the decoder's linears (LoRA, arXiv 2106.09685), added to the weights at
the end, or the weights themselves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.calibration.samples import Sample, together
from planner.models.recovery.moments import faster_products, multiplies_tiles
from planner.models.recovery.refit import replaced
from planner.models.running.bindings import BoundLayer, bind
from planner.models.running.skipping import obeying
from planner.plan import Plan

# Tokens that run together at most, and those whose logits are compared at once.
_TOGETHER, _TOKENS = 4096, 64
# A hundred steps are too few for AdamW's longer memory of squared gradients.
_BETAS = (0.9, 0.95)
_SEEDS = 2**63  # as many as PyTorch's generators take


@dataclass(frozen=True)
class Healing:
    """How to train."""

    steps: int = 100  # of the optimiser
    batch: int = 8  # samples a step
    rank: int = 32  # of the low-rank changes; 0 trains the weights themselves
    # At its highest; it rises over a tenth of the steps, and falls to 0. By default 2e-3 for
    # low-rank changes, and 2e-4 for the weights themselves.
    learning_rate: float | None = None
    seed: int = 0  # which samples come when, and how changes begin

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("rank", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 < self.highest_rate < math.inf:
            raise InputError(
                f"the learning rate must be above 0 and finite, not {self.learning_rate}"
            )
        if not 0 <= self.seed < _SEEDS:
            raise InputError(f"the seed must be at least 0 and below 2**63, not {self.seed}")

    @property
    def highest_rate(self) -> float:
        """The learning rate at its highest."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-3 if self.rank else 2e-4


@dataclass(frozen=True)
class Healed:
    """What came out."""

    # Parameter name -> value, recovered and healed; for `exchange` and `replaced`.
    weights: Mapping[str, Tensor]
    losses: tuple[float, ...]  # KL divergence from the base model in nats per token, one a step


class _LowRank(nn.Module):
    """A weight plus a product of two thin matrices; nothing at the start."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        thin = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        self.down = nn.Parameter(thin.to(weight))
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def heal(
    model: Any,
    graph: Graph,
    plan: Plan,
    weights: Mapping[str, Tensor],
    samples: Sequence[Sample],
    settings: Healing | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Healed:
    """Train under a plan against the base model's outputs.

    Args:
        model: dense, in evaluation mode; left as it was.
        graph: of the model.
        plan: layers, heads and MLP groups count; token stages do not.
        weights: recovered ones to start from (`planner.models.recovery.refitted`).
        samples: what to train on.
        settings: how.
        progress: called with the step and its loss.

    Raises InputError: there are no samples.
    """
    settings = settings or Healing()
    if not samples:
        raise InputError("healing needs samples to train on")
    # Its weights stay as they are while the student's change.
    teacher = copy.deepcopy(model).requires_grad_(False)
    tiles = multiplies_tiles(model)
    plan = replace(plan, tokens=(), kv="")
    linears = _linears(bind(model, graph), plan)
    order = torch.Generator().manual_seed(settings.seed)
    own = {name: model.get_parameter(name) for name in linears}
    losses = []
    with (
        replaced(model, {**own, **weights}),
        _trained(model, linears, settings) as parameters,
        # What stays as it is sets the precision of hidden states, which sums and casts depend on.
        _rounded([*teacher.parameters(), *_others(model, linears)] if tiles else []),
        obeying(model, graph, plan),
    ):
        optimiser = torch.optim.AdamW(
            parameters, lr=settings.highest_rate, betas=_BETAS, weight_decay=0.0, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            settings.highest_rate,
            settings.steps + 1,
            pct_start=0.1,
            cycle_momentum=False,
        )
        drawn = _drawn(len(samples), settings.steps * settings.batch, order)
        for step in range(settings.steps):
            some = [samples[next(drawn)] for _ in range(settings.batch)]
            longest = max(sample.inputs["input_ids"].shape[1] for sample in some)
            total = 0.0
            for alike in together(some, max(1, _TOGETHER // longest)):
                share = len(alike.inputs["input_ids"]) / settings.batch
                with faster_products(model):
                    total += _pull(model, teacher, alike.inputs, share)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            losses.append(total)
            progress(step + 1, total)
        healed = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    return Healed({**weights, **healed}, tuple(losses))


def _drawn(of: int, count: int, generator: torch.Generator) -> Iterator[int]:
    """Numbers below `of`, each as often as the others."""
    rounds = -(-count // of)
    return iter(
        torch.cat([torch.randperm(of, generator=generator) for _ in range(rounds)]).tolist()
    )


def _pull(student: Any, teacher: Any, inputs: Mapping[str, Any], share: float) -> float:
    """Add the gradients of a share of KL(teacher || student), mean over tokens; returns it.

    At the student's logits the gradient is softmax(student) - softmax(teacher). Over a large
    vocabulary a few tokens at a time take a fraction of the time that all together do.
    """
    with torch.no_grad():
        base = teacher(**inputs, use_cache=False).logits.flatten(0, 1)
    logits = student(**inputs, use_cache=False).logits.flatten(0, 1)
    gradient, lost = torch.empty_like(logits), 0.0
    weight = share / len(logits)
    parts = (base, logits.detach(), gradient)
    for theirs, own, slope in zip(*(part.split(_TOKENS) for part in parts), strict=True):
        wanted, found = theirs.float().log_softmax(-1), own.float().log_softmax(-1)
        chances = wanted.exp()
        lost += float((chances * (wanted - found)).sum()) * weight
        slope.copy_((found.exp() - chances) * weight)
    logits.backward(gradient)
    return lost


def _linears(layers: Sequence[BoundLayer], plan: Plan) -> dict[str, Any]:
    """Parameter name -> linear, of all sites in layers that are on."""
    return {
        f"{linear.path}.weight": linear.module
        for layer in layers
        if layer.index not in plan.layers_off
        for site in (layer.heads, layer.mlp)
        if site is not None
        for linear in site.linears
    }


def _others(model: nn.Module, linears: Mapping[str, Any]) -> list[nn.Parameter]:
    """Parameters of everything else."""
    own = {id(p) for linear in linears.values() for p in linear.parameters()}
    return [p for p in model.parameters() if id(p) not in own]


@contextmanager
def _rounded(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters in bfloat16, for a block; buffers, such as frequencies, stay precise."""
    before = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)
    try:
        yield
    finally:
        for parameter, values in zip(parameters, before, strict=True):
            parameter.data = values


@contextmanager
def _trained(
    model: nn.Module, linears: Mapping[str, Any], settings: Healing
) -> Iterator[list[nn.Parameter]]:
    """What is trained, for a block; gradients of nothing else are asked for."""
    asked = {p: p.requires_grad for p in model.parameters()}
    generator = torch.Generator().manual_seed(settings.seed)
    model.requires_grad_(False)
    found: list[nn.Parameter] = []
    try:
        for linear in linears.values():
            if settings.rank:
                change = _LowRank(linear.weight, settings.rank, generator)
                parametrize.register_parametrization(linear, "weight", change)
                found += change.parameters()
            else:
                found.append(linear.weight.requires_grad_(True))
        with torch.enable_grad():
            yield found
    finally:
        for linear in linears.values():
            if parametrize.is_parametrized(linear, "weight"):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
