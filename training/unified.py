"""The unified controller: a scheduler over image tokens, heads, MLP groups and layers.

    planner train training/configs/unified.yaml [--set method=grpo --set freeze_model=true ...]

`method` is how it learns: an estimator, whose gradient reaches the model too unless that is frozen
(`estimators`), or a way to train a policy, with the model frozen (`policy_methods`). `start` is a
folder of an earlier run, whose model and scheduler this one goes on from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator
from torch import nn

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.scheduling import Scheduler, load_scheduler
from planner.training import adallava, estimators, policy_methods
from planner.training.adallava import AdaLlavaConfig, AdaptiveModel, Learner
from planner.training.config import Count, Weight
from planner.training.policy import PolicyModel, Reward


class UnifiedConfig(AdaLlavaConfig):
    """Everything that makes one unified controller; a batch counts conversations."""

    recipe: str = "unified"
    switches: str = "tokens,layers,heads,mlp"
    method: str = "gumbel:temperature=5"
    # A folder with a scheduler of the same switches, and the model that it was trained with.
    start: Path | None = None

    # Of a policy: plans tried for a prompt are so many sets of tokens with so many of switches.
    token_draws: Count = 2
    switch_draws: Count = 2
    reward: Literal["nll", "correct"] = "nll"
    flops_penalty: Weight = 0.0

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        if not _is_policy(self):
            estimators.parse(self.method)
            return self
        method = policy_methods.parse(self.method)
        if method.epochs > 1 and self.gradient_accumulation_steps > 1:
            raise InputError(
                f"{self.method} makes {method.epochs} updates with each batch, so it cannot gather "
                f"{self.gradient_accumulation_steps} batches for one: gradient_accumulation_steps=1"
            )
        return self


def _is_policy(config: UnifiedConfig) -> bool:
    return config.method.partition(":")[0] in policy_methods.METHODS


def started(config: UnifiedConfig) -> UnifiedConfig:
    """The configuration with the model that it starts from."""
    if config.start is None:
        return config
    return config.model_copy(update={"model": str(config.start)})


def learner(
    config: UnifiedConfig,
    model: nn.Module,
    graph: Graph,
    scheduler: Scheduler,
    load: Workload | None,
) -> AdaptiveModel:
    """What is trained, by the configuration's method."""
    if config.start is not None:
        known = load_scheduler(config.start, graph)
        if known.layout != scheduler.layout:
            raise InputError(
                f"the scheduler in '{config.start}' is of {known.layout.name}, and the "
                f"configuration of {scheduler.layout.name}"
            )
        scheduler.load_state_dict(known.state_dict())
    if not _is_policy(config):
        return AdaptiveModel(model, graph, scheduler, estimators.parse(config.method), load)
    return PolicyModel(
        model,
        graph,
        scheduler,
        policy_methods.parse(config.method),
        Reward(config.reward, config.flops_penalty),
        tokens=config.token_draws,
        switches=config.switch_draws,
        load=load,
    )


def train(config: UnifiedConfig, learner: Learner = learner) -> AdaptiveModel:
    """Train, or go on from the last checkpoint; export where `export_dir` is set."""
    return adallava.train(started(config), learner)
