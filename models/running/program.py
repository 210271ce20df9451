"""A plan made executable: for every decoder layer, what runs and with which weights.

Samples of one batch may follow different plans. Layer by layer, samples that do the same form a
group; a layer runs once per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.intervals import Intervals
from planner.models.running.bindings import BoundLayer, BoundSite
from planner.plan import Plan, TokenStage
from planner.planning.selectors import (
    AnswerPolicy,
    KVPolicy,
    Needs,
    VoCo,
    parse_kv_policy,
    selector_of,
)
from planner.planning.selectors.eviction import check_beside, check_policy


def check_plan(plan: Plan, graph: Graph) -> None:
    """Raise InputError unless the plan was made for this graph and can be carried out on it."""
    plan.check(graph)
    for layer in plan.layers_off:
        if f"layer.{layer}" not in graph.sites_by_name:
            raise InputError(
                f"the plan switches layer {layer} off, which '{graph.name}' cannot do without"
            )
    if plan.kv:
        policy = parse_kv_policy(plan.kv)
        check_policy(policy, graph)
        for stage in plan.tokens:
            check_beside(policy, selector_of(stage), stage.selector)


@dataclass(frozen=True)
class LayerGroup:
    """What one layer does for some samples."""

    samples: tuple[int, ...]  # indices into the plans of a batch
    on: bool = True
    heads: Intervals | None = None  # kept KV groups; None for all of them
    mlp: Intervals | None = None  # kept neurons; None for all of them
    stages: tuple[TokenStage, ...] = ()  # up to and including this layer
    kv: KVPolicy | None = None  # what the cache holds; None where it holds everything
    renumbered: bool = False  # whether some stage gives tokens contiguous position ids

    @property
    def attends(self) -> bool:
        """Whether any head of its attention, where there is one, is left."""
        return self.on and self.heads != ()

    @property
    def has_keys(self) -> bool:
        """Whether this layer has keys for some tokens only, so must know which."""
        return bool(self.stages) or self.kv is not None

    @property
    def drops(self) -> bool:
        """Whether tokens of a pass may be dropped before this layer."""
        return bool(self.stages) or isinstance(self.kv, AnswerPolicy)


@dataclass(frozen=True)
class LayerProgram:
    """Groups that cover all samples exactly once."""

    layer: BoundLayer
    groups: tuple[LayerGroup, ...]

    def of(self, sample: int) -> LayerGroup:
        """What it does for a sample."""
        return next(group for group in self.groups if sample in group.samples)


@dataclass(frozen=True)
class Program:
    """What every layer, in model order, does under one plan for all samples, or one per sample.

    Equal keys run equally.
    """

    key: tuple[object, ...]
    plans: tuple[Plan, ...]
    layers: tuple[LayerProgram, ...]

    @staticmethod
    def build(plans: Sequence[Plan], graph: Graph, layers: Sequence[BoundLayer]) -> Program:
        """Check plans, raising InputError, and work out who does what in each layer."""
        distinct = {plan.key: plan for plan in reversed(plans)}
        for plan in distinct.values():
            check_plan(plan, graph)
        plans = plans[:1] if len(distinct) == 1 else plans
        keys = tuple(plan.key for plan in plans)
        plans = [replace(plan, tokens=_in_turn(plan.tokens)) for plan in plans]
        return Program(
            keys,
            tuple(plans),
            tuple(LayerProgram(layer, _groups(layer, plans)) for layer in layers),
        )

    @property
    def is_dense(self) -> bool:
        """Whether this is the base model."""
        return all(plan.is_dense for plan in self.plans)

    def scored_by(self, stage: TokenStage) -> dict[int, tuple[int, ...]]:
        """Which layers' attention scores the tokens of a stage, ascending, and for which plans.

        They are the last layers before the stage that attend, as many as the selector asks for, or
        the next one where it asks for that; raises InputError where there is none.
        """
        found: dict[int, tuple[int, ...]] = {}
        selector = selector_of(stage)
        layers, where = self.layers[: stage.layer][::-1], "an earlier layer"
        if Needs.NEXT_QUERY_KEY in selector.needs:
            layers, where = self.layers[stage.layer :], "a later layer"
        for index, plan in enumerate(self.plans):
            if stage not in plan.tokens:
                continue
            attending = [
                layer.layer.index
                for layer in layers
                if layer.layer.heads is not None and layer.of(index).attends
            ]
            if not attending:
                raise InputError(
                    f"{stage.selector} at layer {stage.layer} scores tokens by the attention of "
                    f"{where}, and the plan leaves none on"
                )
            first = stage.layer - selector.scored_layers(stage.layer)
            for number, layer in enumerate(attending):
                if not number or first <= layer < stage.layer:
                    found[layer] = (*found.get(layer, ()), index)
        return dict(sorted(found.items()))

    @property
    def answer_policies(self) -> set[AnswerPolicy]:
        """Those by which some tokens of an answer are kept."""
        groups = (group for layer in self.layers for group in layer.groups)
        return {group.kv for group in groups if isinstance(group.kv, AnswerPolicy)}

    @property
    def sums_up(self) -> bool:
        """Whether VoCo tokens stand for the image, for some sample."""
        groups = (group for layer in self.layers for group in layer.groups)
        return any(isinstance(group.kv, VoCo) for group in groups)

    @property
    def has_tokens(self) -> bool:
        """Whether tokens are dropped somewhere, for some sample."""
        return any(plan.tokens for plan in self.plans)

    @property
    def evicts(self) -> bool:
        """Whether the cache leaves tokens out, for some sample."""
        return any(plan.kv for plan in self.plans)


def _in_turn(stages: Sequence[TokenStage]) -> tuple[TokenStage, ...]:
    """Stages, each of what the one before has left; from none there is none to drop."""
    ordered: list[TokenStage] = []
    for stage in stages:
        before = ordered[-1].keep if ordered else stage.of
        if before:
            ordered.append(replace(stage, of=before))
    return tuple(ordered)


def _groups(layer: BoundLayer, plans: Sequence[Plan]) -> tuple[LayerGroup, ...]:
    members: dict[LayerGroup, list[int]] = {}
    for index, plan in enumerate(plans):
        members.setdefault(_act(layer, plan), []).append(index)
    return tuple(replace(act, samples=tuple(samples)) for act, samples in members.items())


def _act(layer: BoundLayer, plan: Plan) -> LayerGroup:
    """What a layer does under one plan, for nobody yet."""
    index = layer.index
    stages = tuple(stage for stage in plan.tokens if stage.layer <= index)
    policy = parse_kv_policy(plan.kv) if plan.kv else None
    if policy is not None and index < policy.layer:
        policy = None
    scoreless = None if policy is not None and policy.scores_by_attention else policy
    if index in plan.layers_off:
        return LayerGroup((), on=False, stages=stages, kv=scoreless)
    renumbered = any(selector_of(stage).renumbers for stage in stages)
    heads = _lanes(plan, layer.heads)
    return LayerGroup(
        (),
        heads=heads,
        mlp=_lanes(plan, layer.mlp),
        stages=stages,
        kv=scoreless if heads == () else policy,
        renumbered=renumbered,
    )


def _lanes(plan: Plan, bound: BoundSite | None) -> Intervals | None:
    """Lanes that a plan keeps of a site; None for all of them."""
    kept = None if bound is None else plan.kept(bound.site)
    if bound is None or kept is None or kept.everything:
        return None
    if bound.obstacle:
        raise InputError(
            f"the plan narrows {bound.site.name}, but {bound.obstacle}; load the model without "
            f"quantisation, adapters or offloading"
        )
    return kept.lanes
