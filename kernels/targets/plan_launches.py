"""What a plan launches: the ops that the executor calls for it, run on tensors without storage.

Tiles and everything else about a launch are therefore decided in one place, the kernels' launchers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from planner.ir.cost.workload import Workload
from planner.ir.dims import Dim
from planner.ir.graph import Binding, Graph, Operator, Site
from planner.ir.intervals import Intervals, merged
from planner.kernels.mlp_blocks import MLPBlock, NotFusable, mlp_block, unit_width
from planner.kernels.ops.attend import Attend
from planner.kernels.ops.choose_tokens import ChooseTokens
from planner.kernels.ops.gather_tokens import GatherTokens
from planner.kernels.ops.project_columns import ProjectColumns
from planner.kernels.ops.project_rows import ProjectRows
from planner.kernels.ops.score_tokens import ScoreTokens
from planner.kernels.survivors import Survivors, neuron_width
from planner.kernels.triton.launch import Launch, recorded
from planner.kernels.triton.tiles import Product, Target, Tile, best_tile, tiles_chosen_by
from planner.plan import Plan

Tiles = dict[Product, Tile]


@dataclass(frozen=True)
class Call:
    """One op that a plan calls."""

    module: str  # whose work it does, as the layer calls it: ``mlp``, ``self_attn.q_proj``
    layer: int
    phase: str  # ``prefill`` or ``decode``
    batch: int
    tokens: int  # per sample
    run: Callable[[], Any]  # calls the op on meta tensors


def calls_of(
    graph: Graph,
    plan: Plan,
    workload: Workload,
    dtype: torch.dtype,
    *,
    any_plan: bool = False,
) -> tuple[list[Call], list[str]]:
    """The ops that the executor calls under a plan of a base model's graph, at a workload's token
    counts; and a sentence for every block it does not fuse.

    `any_plan` has survivors as executors of several plans have them: with room for all units.
    InputError where the plan does not fit the graph.
    """
    plan.check(graph)
    keep = {stage.layer: stage.keep for stage in plan.tokens}
    phases = [("prefill", workload.prefill(keep))]
    if workload.new_tokens:
        # Keys are divided among programs by their number, which grows.
        steps = dict.fromkeys((1, workload.new_tokens))
        phases += [("decode", workload.decode(step, keep)) for step in steps]
    lister = _Lister(graph, plan, dtype, any_plan)
    calls = [call for phase, sizes in phases for call in lister.calls(phase, sizes)]
    return calls, lister.unfused


def launches_of(calls: Iterable[Call], target: Target) -> list[tuple[Call, Launch]]:
    """The launches of some ops, tiled for a target; InputError where no tile fits into its shared
    memory."""
    launches = []
    for call in calls:
        with recorded(target) as made:
            call.run()
        launches += [(call, launch) for launch in made]
    return launches


def launches_and_tiles(
    calls: Iterable[Call], target: Target, measured: Tiles | None = None
) -> tuple[list[tuple[Call, Launch]], Tiles]:
    """`launches_of` with measured tiles where there are some; and the tile of every product."""
    tiles: Tiles = {}

    def choose(wanted: Product) -> Tile:
        tiles[wanted] = (measured or {}).get(wanted) or best_tile(wanted)
        return tiles[wanted]

    with tiles_chosen_by(choose):
        return launches_of(calls, target), tiles


class _Lister:
    """Reads the specialised graph operator by operator; survivors come from the plan."""

    def __init__(self, graph: Graph, plan: Plan, dtype: torch.dtype, any_plan: bool) -> None:
        # Brings the solver, which a machine that only measures kernels may lack.
        from planner.planning.compiler import specialised

        self.plan, self.dtype, self.any_plan = plan, dtype, any_plan
        self.narrow = specialised(graph, plan)
        self.base = {o.module: o for o in graph if o.kind == "linear"}
        self.bound: dict[str, tuple[Site, Binding]] = {}
        self.fused: dict[str, tuple[Site, MLPBlock]] = {}
        self.unfused: list[str] = []
        for site in graph.sites:
            self.bound |= {binding.module: (site, binding) for binding in site.bindings}
            if site.kind == "mlp" and plan.kept(site).lanes:
                try:
                    block = mlp_block(graph, site)
                except NotFusable as why:
                    self.unfused.append(f"{site.module} is not fused: {why}")
                else:
                    self.fused |= {linear.module: (site, block) for linear in block.linears}

    def calls(self, phase: str, sizes: Mapping[str, int]) -> Iterator[Call]:
        """The ops of one pass, in order."""
        for operator in self.narrow:
            if operator.part != "decoder" or operator.layer is None:
                continue
            for module, tokens, op in self.ops(operator, phase, sizes):
                name = module.rpartition(f".{operator.layer}.")[2]
                yield Call(name, operator.layer, phase, sizes["batch"], tokens, op)

    def ops(
        self, operator: Operator, phase: str, sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, int, Callable[[], Any]]]:
        """What runs in place of an operator: (module, tokens, op) each."""
        module, batch = operator.module, sizes["batch"]
        if module in self.fused:
            site, block = self.fused[module]
            if module == block.down.module:
                tokens = _sized(operator.shape[1], sizes)
                for partly in (False, True) if self.any_plan else (False,):
                    yield site.module, tokens, partial(self.mlp, site, block, batch, tokens, partly)
        elif module in self.bound and operator.kind == "linear":
            tokens = _sized(operator.shape[1], sizes)
            yield module, tokens, partial(self.linear, self.base[module], batch, tokens)
        elif operator.kind == "attention" and _is_plain(operator):
            tokens, keys = _sized(operator.shape[2], sizes), _sized(operator["keys"], sizes)
            for masked in (False, True):
                yield module, tokens, partial(self.attention, operator, batch, tokens, keys, masked)
        elif operator.kind == "select_tokens" and phase == "prefill":
            before, after = _sized(operator["before"], sizes), _sized(operator.shape[1], sizes)
            if operator["score_width"]:
                yield "tokens", before, partial(self.choice, operator, batch, before)
            yield "tokens", before, partial(self.gather, operator, batch, before, after)

    # Ops on meta tensors.

    def linear(self, linear: Operator, batch: int, tokens: int) -> None:
        site, binding = self.bound[linear.module]
        ins, outs = linear.integer("in"), linear.integer("out")
        every = outs if binding.axis == "out" else ins
        weight, bias = self.tensor(outs, ins), self.bias(linear)
        lanes = self.plan.kept(site).lanes
        kept, width = kept_features(site, binding, lanes, every), unit_width(binding, every)
        survivors = self.known(Survivors.packed(kept, width, "meta"))
        if binding.axis == "out":
            x = self.tensor(batch, tokens, ins)
            ProjectRows(x, weight, bias, survivors).run(triton=True)
        else:
            a = self.tensor(batch, tokens, survivors.slots * survivors.width)
            ProjectColumns(a, weight, bias, survivors).run(triton=True)

    def mlp(self, site: Site, block: MLPBlock, batch: int, tokens: int, partly: bool) -> None:
        """`partly`: as if units survived in part, whether those of this plan do or not."""
        neurons, hidden = site.lanes, block.up.integer("in")
        up, down = self.tensor(neurons, hidden), self.tensor(block.down.integer("out"), neurons)
        gate, gate_bias = None, None
        if block.gate is not None:
            gate, gate_bias = self.tensor(neurons, hidden), self.bias(block.gate)
        lanes = self.plan.kept(site).lanes
        survivors = self.known(Survivors.packed(lanes, neuron_width(neurons), device="meta"))
        if self.any_plan:
            partial_lanes = torch.empty_like(survivors.units) if partly else None
            survivors = replace(survivors, lanes=partial_lanes)
        x, further = self.tensor(batch, tokens, hidden), (True, gate, gate_bias, block.activation)
        inner = ProjectRows(x, up, self.bias(block.up), survivors, *further).run(triton=True)
        ProjectColumns(inner, down, self.bias(block.down), survivors).run(triton=True)

    def attention(
        self, operator: Operator, batch: int, tokens: int, keys: int, masked: bool
    ) -> None:
        heads, kv_heads = operator.integer("heads"), operator.integer("kv_heads")
        head_dim = operator.integer("head_dim")
        key = self.tensor(batch, kv_heads, keys, head_dim)
        mask = torch.empty(batch, 1, tokens, keys, dtype=torch.bool, device="meta")
        query = self.tensor(batch, tokens, heads, head_dim).transpose(1, 2)
        every = self.known(Survivors.everything(kv_heads, torch.device("meta")))
        mask_or_none, causal = (mask, False) if masked else (None, tokens > 1)
        Attend(query, key, key, mask_or_none, every, 1.0, causal).run(triton=True)

    def choice(self, stage: Operator, batch: int, tokens: int) -> None:
        """Score tokens by the attention in front of a stage, and choose."""
        before = self.narrow.operators[: self.narrow.operators.index(stage)]
        core = next(o for o in reversed(before) if o.kind == "attention" and o.part == "decoder")
        head_dim = core.integer("head_dim")
        visible = torch.empty(batch, tokens, dtype=torch.bool, device="meta")
        query = self.tensor(batch, core.integer("heads"), 1, head_dim)
        key = self.tensor(batch, core.integer("kv_heads"), tokens, head_dim)
        scores = ScoreTokens(query, key, visible, 1.0).run(triton=True)
        counts = torch.empty(batch, dtype=torch.int64, device="meta")
        ChooseTokens(scores, visible, counts).run(triton=True)

    def gather(self, stage: Operator, batch: int, before: int, after: int) -> None:
        index = torch.empty(batch, after, dtype=torch.int64, device="meta")
        width = _sized(stage.shape[-1], {})
        GatherTokens(self.tensor(batch, before, width), index).run(triton=True)

    def tensor(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device="meta")

    def bias(self, linear: Operator) -> Tensor | None:
        return self.tensor(linear.integer("out")) if linear["bias"] else None

    def known(self, survivors: Survivors) -> Survivors:
        """Survivors of a plan; of any plan, nobody knows what they hold."""
        return replace(survivors, kept_runs=None) if self.any_plan else survivors


def kept_features(site: Site, binding: Binding, lanes: Intervals, every: int) -> Intervals:
    """Features of a weight that a plan keeps: those of its lanes, and those of no lane."""
    edges = [0, *(edge for run in binding.features(((0, site.lanes),)) for edge in run), every]
    return merged([*zip(edges[::2], edges[1::2], strict=True), *binding.features(lanes)])


def _is_plain(attention: Operator) -> bool:
    """Whether the kernel computes it: scores that are not capped, values as wide as keys."""
    return not attention.get("capped") and attention["head_dim"] == attention["value_dim"]


def _sized(value: int | str | Dim, sizes: Mapping[str, int]) -> int:
    return Dim.of(value).evaluate(sizes)
