"""Healing: a short training under a plan towards what the base model says.

The student is the model with the plan's switches masked and the recovered weights of its sites,
which computes what the narrowed model does; the teacher is the same model without plan and changes.
The loss is KL(teacher || student) at every token (Hinton et al., arXiv 1503.02531). Trained are
either low-rank changes of the decoder's linears (LoRA, arXiv 2106.09685), added to the weights at
the end, or the weights themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.calibration.samples import Sample
from planner.models.recovery.moments import faster_products
from planner.models.recovery.refit import replaced
from planner.models.running.masked import Gates, MaskedExecutor
from planner.plan import Plan

# Whose logits are compared at once.
_TOKENS = 64


@dataclass(frozen=True)
class Healing:
    """How to train.

    Attributes:
        steps: of the optimiser.
        batch: samples a step.
        rank: of the low-rank changes; 0 trains the weights themselves.
        learning_rate: at its highest; it rises over a tenth of the steps, and falls to 0. By
            default 2e-3 for low-rank changes, and 1e-4 for the weights themselves.
        seed: which samples come when, and how changes begin.
    """

    steps: int = 100
    batch: int = 4
    rank: int = 32
    learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("rank", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.highest_rate > 0:
            raise InputError(f"the learning rate must be above 0, not {self.learning_rate}")

    @property
    def highest_rate(self) -> float:
        """The learning rate at its highest."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-3 if self.rank else 1e-4


@dataclass(frozen=True)
class Healed:
    """What came out.

    Attributes:
        weights: parameter name -> value, recovered and healed; for `exchange` and `replaced`.
        losses: KL divergence from the base model in nats per token, one a step.
    """

    weights: Mapping[str, Tensor]
    losses: tuple[float, ...]


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

    Raises:
        InputError: there are no samples.
    """
    settings = settings or Healing()
    if not samples:
        raise InputError("healing needs samples to train on")
    # Its weights stay as they are while the student's change.
    teacher = copy.deepcopy(model).requires_grad_(False)
    masked, gates = MaskedExecutor(model, graph), Gates.of([plan], graph)
    linears = _linears(masked, plan)
    order = torch.Generator().manual_seed(settings.seed)
    own = {name: model.get_parameter(name) for name in linears}
    losses = []
    with replaced(model, {**own, **weights}), _trained(model, linears, settings) as parameters:
        optimiser = torch.optim.AdamW(parameters, lr=settings.highest_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, settings.highest_rate, settings.steps + 1, pct_start=0.1
        )
        drawn = _drawn(len(samples), settings.steps * settings.batch, order)
        for step in range(settings.steps):
            some = [samples[next(drawn)].inputs for _ in range(settings.batch)]
            total = 0.0
            for inputs, count in _batches(some):
                with faster_products(model), masked.using(gates):
                    total += _pull(model, teacher, inputs, count / settings.batch)
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


def _batches(some: Sequence[Mapping[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """Inputs of equal shapes together, with how many they are."""
    alike: dict[object, list[Mapping[str, Any]]] = {}
    for inputs in some:
        shape = [(name, getattr(value, "shape", value)) for name, value in inputs.items()]
        alike.setdefault(str(shape), []).append(inputs)
    for group in alike.values():
        first = group[0]
        yield (
            {
                name: torch.cat([one[name] for one in group])
                if isinstance(value, Tensor)
                else value
                for name, value in first.items()
            },
            len(group),
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
    for rows in torch.arange(len(logits)).split(_TOKENS):
        wanted = base[rows].float().log_softmax(-1)
        found = logits.detach()[rows].float().log_softmax(-1)
        chances = wanted.exp()
        lost += float((chances * (wanted - found)).sum()) * weight
        gradient[rows] = ((found.exp() - chances) * weight).to(gradient)
    logits.backward(gradient)
    return lost


def _linears(masked: MaskedExecutor, plan: Plan) -> dict[str, Any]:
    """Parameter name -> linear, of all sites in layers that are on."""
    return {
        f"{linear.path}.weight": linear.module
        for layer in masked.layers
        if layer.index not in plan.layers_off
        for site in (layer.heads, layer.mlp)
        if site is not None
        for linear in site.linears
    }


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
