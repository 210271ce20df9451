"""Pricing: from a Graph, a workload and a budget to the Problem that the solver solves.

Every cost table comes from the cost model applied to really narrowed operators, so what the solver
adds up is what the narrowed Graph costs. Layers that are alike are priced once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from planner.ir.cost import Workload, price
from planner.ir.cost.device_table import Device
from planner.ir.cost.memory import peak_bytes
from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Operator, Site
from planner.ir.passes import NarrowPatches, run
from planner.ir.structure import narrowed
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.selectors import (
    KVPolicy,
    Needs,
    Product,
    Selector,
    Sizes,
    TowerSelector,
    VisionSelector,
    scores_by_attention,
)
from planner.planning.selectors.attention_widths import AttentionWidths
from planner.planning.switches import SwitchSet
from planner.planning.utilities import Utilities
from planner.solver.problem import (
    COST_CEILING,
    Costs,
    LayerChoices,
    Pair,
    Problem,
    SiteChoices,
    TokenOption,
)

# Metric -> the whole numbers that one FLOP, second or byte is counted in: seconds in picoseconds.
# Costs are rounded up, limits down.
COUNTED = {"flops": 1, "latency": 10**12, "kv": 1, "memory": 1}
KEEP_FRACTIONS = tuple(eighths / 8 for eighths in range(8, 0, -1))


@dataclass(frozen=True, eq=False)
class Pricing:
    """Costs of one Graph under one workload."""

    graph: Graph  # with switches assigned (`planner.planning.switches.with_switches`)
    workload: Workload
    switches: SwitchSet
    device: Device  # for latency
    scope: str = "model"  # counts everything, ``llm`` the decoder and lm_head alone
    _layer_memo: dict[object, Costs] = field(default_factory=dict)
    # What a selector leaves of the vision tower.
    _towers: dict[TowerSelector, Graph] = field(default_factory=dict)

    def on(self, workload: Workload, switches: SwitchSet) -> Pricing:
        """The same model's costs on another prompt."""
        other = replace(self, workload=workload, switches=switches, _layer_memo={})
        other.__dict__.update(_by_layer=self._by_layer, _widths=self._widths)
        return other

    # -- tokens ------------------------------------------------------------------------------

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """Layers before which tokens may be dropped."""
        if "tokens" not in self.switches.axes or self.workload.image_tokens == 0:
            return ()
        return tuple(k for k in self.switches.token_layers if k < self.graph.layers)

    @cached_property
    def token_options(self) -> tuple[tuple[int, ...], ...]:
        """Keep counts per stage, in eighths, non-increasing, the base model's first."""
        if not self.stages:
            return ((),)
        of = self.workload.image_tokens
        if self.switches.token_counts is not None:
            return (self.switches.token_counts[: len(self.stages)],)
        counts = dict.fromkeys(max(1, int(of * fraction)) for fraction in KEEP_FRACTIONS)
        options: list[tuple[int, ...]] = [()]
        for _ in self.stages:
            options = [o + (c,) for o in options for c in counts if not o or c <= o[-1]]
        return tuple(options)

    def option_of(self, plan: Plan) -> tuple[int, ...]:
        """Image tokens that a plan leaves behind each stage."""
        by_layer = {stage.layer: stage.keep for stage in plan.tokens}
        option, keep = [], self.workload.image_tokens
        for stage in self.stages:
            keep = by_layer.get(stage, keep)
            option.append(keep)
        return tuple(option)

    def _sizes(self, layer: int | None, option: tuple[int, ...], context: bool) -> dict[str, int]:
        """Sizes seen by a decoder layer, in the prefill or (context) at the end of generation."""
        load = self.workload
        sizes = load.decode(load.new_tokens) if context else load.prefill()
        kept = [k for stage, k in zip(self.stages, option, strict=False) if (layer or 0) >= stage]
        if layer is not None and kept:
            dropped = load.image_tokens - kept[-1]
            sizes["context"] -= dropped
            if not context:
                sizes["query"] -= dropped
        policy = self.switches.kv
        if layer is not None and context and policy is not None and layer >= policy.layer:
            prompt = self._sizes(layer, option, context=False)["query"]
            image = kept[-1] if kept else load.image_tokens
            sizes["context"] = policy.kept(prompt, load.new_tokens, image)
        return sizes

    def _all_sizes(self, layer: int, option: tuple[int, ...]) -> tuple[object, ...]:
        """Equal for layers that see as many tokens, in the prefill and at the end."""
        return tuple(tuple(self._sizes(layer, option, end).items()) for end in (False, True))

    # -- cost of a set of operators ----------------------------------------------------------

    def _vector(
        self,
        operators: Sequence[Operator],
        graph: Graph,
        layer: int | None,
        option: tuple[int, ...],
        rows: int = 1,
    ) -> Costs:
        """(flops, latency in ps, KV bytes, memory bytes) of operators; shape (4,).

        `rows`: of every sample, where operators run on so many rather than on one.
        """
        prefill = self._sizes(layer, option, context=False)
        prefill["batch"] *= rows
        costs = [price(operator, graph, prefill, self.device) for operator in operators]
        policy = self.switches.kv
        if policy is not None and policy.scores_by_attention and layer is not None:
            # The scores of all queries once more: one product of two.
            twice = [c for o, c in zip(operators, costs, strict=True) if o.kind == "attention"]
            costs += [
                replace(cost, flops=cost.flops // 2, seconds=cost.seconds / 2, parameters=0)
                for cost in twice
            ]
        end = self._sizes(layer, option, context=True)
        kv = sum(price(o, graph, end).kv_bytes for o in operators if o.kind == "attention")
        weights = sum(c.parameters for c in costs) * int(self.graph.properties["dtype_bytes"])
        vector = [
            sum(c.flops for c in costs),
            math.ceil(math.fsum(c.seconds for c in costs) * COUNTED["latency"]),
            kv,
            weights + kv,
        ]
        # A layer and its sites are priced apart; all of them together must not overflow.
        self._check(max(vector))
        return np.array(vector, dtype=np.int64)

    def _check(self, cost: int) -> None:
        """Refuse a cost of which a few would overflow."""
        if cost > COST_CEILING // (4 * (self.graph.layers + 2)):
            raise InputError(
                f"the workload is too large to be priced: {self.workload.prompt_tokens} tokens a "
                f"prompt, {self.workload.new_tokens} new ones, batch {self.workload.batch}"
            )

    @cached_property
    def _working_bytes(self) -> int:
        """Memory of the base prefill besides weights and cache: what a plan needs at most."""
        sizes = self.workload.prefill()
        costs = [price(operator, self.graph, sizes) for operator in self.graph]
        weights = sum(cost.parameters for cost in costs) * int(self.graph.properties["dtype_bytes"])
        found = peak_bytes(self.graph, sizes) - weights - sum(cost.kv_bytes for cost in costs)
        self._check(found)
        return found

    # -- tables ------------------------------------------------------------------------------

    @cached_property
    def _by_layer(self) -> dict[int | None, list[Operator]]:
        grouped: dict[int | None, list[Operator]] = {None: []}
        for operator in self.graph:
            if self.scope == "model" or operator.part in ("decoder", "head"):
                key = operator.layer if operator.part == "decoder" else None
                grouped.setdefault(key, []).append(operator)
        return grouped

    @cached_property
    def _widths(self) -> AttentionWidths:
        return AttentionWidths(self.graph)

    @cached_property
    def encoder(self) -> Costs:
        """Cost of what runs in front of the decoder; shape (4,)."""
        if self.scope == "llm":
            return np.zeros(4, dtype=np.int64)
        cost = self._front_cost.copy()
        if self.workload.encoder_flops is not None:
            cost[0] = self.workload.encoder_flops
        return cost

    @cached_property
    def outside(self) -> Costs:
        """Cost of everything outside the decoder layers; shape (4,).

        Tokens that a stage drops are back in their places behind the last layer.
        """
        cost = self.encoder + self.ends
        cost[3] += self._working_bytes
        if self.switches.kv is not None:
            cost[3] += self._weight_bytes(self.switches.kv)
        return cost

    def _weight_bytes(self, decides: Selector | KVPolicy) -> int:
        """Bytes of the weights that decide, beside the model's own."""
        properties = self.graph.properties
        return decides.parameters(int(properties["hidden_size"])) * int(properties["dtype_bytes"])

    @cached_property
    def ends(self) -> Costs:
        """Cost of the decoder besides its layers, output embedding included; shape (4,)."""
        found = [o for o in self._by_layer[None] if o.part not in ("vision", "projector")]
        head = [o for o in found if o.part == "head"]
        others = [o for o in found if o.part != "head"]
        cost = self._vector(others, self.graph, None, ())
        prefill = self.workload.prefill()
        seconds = self.device.pass_seconds(self.graph.dtype_bytes, prefill)
        cost[1] += math.ceil(seconds * COUNTED["latency"])
        return cost + self._vector(head, self.graph, None, (), self.workload.logits)

    def selection(self, option: tuple[int, ...], plan: Plan | None = None) -> Costs:
        """Cost of scoring and gathering tokens at every stage that drops any; shape (4,).

        Under a plan scores come from the heads that run; without one from all heads. What a stage
        inside the vision tower saves there is taken off.
        """
        cost = np.zeros(4, dtype=np.int64)
        previous = self.workload.image_tokens
        for stage, keep in zip(self.stages, option, strict=False):
            if keep < previous:
                scored = scores_by_attention(self.switches.token_selector)
                width = self._widths.of_queries(stage, plan) if scored else 0
                selector = self.switches.selector
                if scored and selector is not None and Needs.NEXT_QUERY_KEY in selector.needs:
                    # Heads that a plan leaves are those of another layer.
                    width = self._widths.near(stage)[0]
                cost = cost + self._selection(stage, option, width)
                if selector is not None:
                    cost = cost + self._choosing(selector.at_layer(stage), stage, previous)
            previous = keep
        return cost

    def _choosing(self, selector: Selector, stage: int, image_tokens: int) -> Costs:
        """Cost of what a selector multiplies to choose from so many tokens; shape (4,)."""
        load, in_vision = self.workload, isinstance(selector, VisionSelector)
        if in_vision and self.scope == "llm":
            return np.zeros(4, dtype=np.int64)
        if isinstance(selector, TowerSelector):
            narrow = self._narrow_front(selector)
            return self._vector(_front(narrow), narrow, None, ()) - self._front_cost
        sizes = Sizes(
            load.image_tokens_per_run if in_vision else image_tokens,
            load.text_tokens,
            # Of all heads: a plan with fewer costs less.
            *self._widths.near(stage),
            int(self.graph.properties["hidden_size"]),
            *self._widths.of_tower(load.image_tokens_per_run),
        )
        cost = self.products(selector.products(stage, sizes), "images" if in_vision else "batch")
        cost[3] += self._weight_bytes(selector) if stage == self.stages[0] else 0
        return cost

    def _narrow_front(self, selector: TowerSelector) -> Graph:
        """The model with the patches that are left inside its vision tower."""
        if selector not in self._towers:
            narrow = NarrowPatches(selector.stages_in(self.graph))
            self._towers[selector] = run(self.graph, [narrow])
        return self._towers[selector]

    @cached_property
    def _front_cost(self) -> Costs:
        """Cost of what runs in front of the decoder, by the Graph; shape (4,)."""
        return self._vector(_front(self.graph), self.graph, None, ())

    def products(self, products: Sequence[Product], each: str = "batch") -> Costs:
        """Cost of products of matrices that no operator of the Graph makes; shape (4,).

        `each`: the size that says how often they are made, ``batch`` or ``images``.
        """
        operators = [
            Operator(f"product.{i}", "matmul", (), (Dim.of(each), Dim(rows), Dim(columns))).having(
                inner=inner
            )
            for i, (rows, columns, inner) in enumerate(products)
        ]
        return self._vector(operators, self._of(operators), None, ())

    def _selection(self, stage: int, option: tuple[int, ...], width: int) -> Costs:
        hidden = (Dim.of("batch"), Dim.of("query"), Dim(int(self.graph.properties["hidden_size"])))
        load = self.workload
        tokens = self._sizes(stage - 1, option, False)["query"] if stage else load.prompt_tokens
        operator = Operator("tokens", "select_tokens", (), hidden).having(
            before=Dim(tokens), score_width=width
        )
        return self._vector([operator], self._of([operator]), stage, option)

    def _of(self, operators: Sequence[Operator]) -> Graph:
        """A graph of nothing else, with what holds of the whole model."""
        return Graph("", tuple(operators), (), self.graph.properties)

    def fixed(self, layer: int, option: tuple[int, ...], sites: Sequence[Site]) -> Costs:
        """Cost of a layer being on, its switchable sites left out; shape (4,)."""
        names = {site.name for site in sites}
        here = self._by_layer.get(layer, [])
        operators = [o for o in here if not any(s in names for _, s in o.narrowed_by)]
        key = (self._alike(operators), *self._all_sizes(layer, option))
        if key not in self._layer_memo:
            self._layer_memo[key] = self._vector(operators, self.graph, layer, option)
        return self._layer_memo[key]

    def table(self, site: Site, option: tuple[int, ...]) -> Costs:
        """Cost of keeping 0, 1, ... switches of a site; shape (4, switches + 1).

        Where switches differ by one lane the first, wider ones are counted first, so a cost is
        never understated.
        """
        here = self._by_layer.get(site.layer, [])
        operators = [o for o in here if any(name == site.name for _, name in o.narrowed_by)]
        sizes = self._all_sizes(site.layer, option)
        key = (self._alike(operators), site.lanes, site.switches, *sizes)
        if key not in self._layer_memo:
            bounds = site.bounds
            columns = [np.zeros(4, dtype=np.int64)]
            for count in range(1, site.switches + 1):
                kept = {site.name: (bounds[count], site.lanes)}
                some = [narrowed(o, kept) for o in operators]
                around = self._around(some)
                columns.append(self._vector(some, around, site.layer, option))
            self._layer_memo[key] = np.maximum.accumulate(np.stack(columns, axis=1), axis=1)
        return self._layer_memo[key]

    def _around(self, operators: Sequence[Operator]) -> Graph:
        """Narrowed operators with the operators they read, for the sizes of their inputs."""
        names = {o.name for o in operators}
        known = self.graph.by_name
        read = {i for o in operators for i in o.inputs if i not in names and i in known}
        return self._of([*(known[name] for name in sorted(read)), *operators])

    @staticmethod
    def _alike(operators: Sequence[Operator]) -> tuple[object, ...]:
        """Equal for layers whose operators cost the same."""
        return tuple((o.kind, o.shape, o.attributes, len(o.inputs)) for o in operators)

    # -- whole costs -------------------------------------------------------------------------

    @cached_property
    def base(self) -> dict[str, float]:
        """Cost of the base model per metric: FLOPs, seconds, bytes, bytes."""
        if self.switches.kv is not None:
            return replace(self, switches=replace(self.switches, kv=None), _layer_memo={}).base
        option = (self.workload.image_tokens,) * len(self.stages)
        cost = self.outside
        for layer in range(self.graph.layers):
            sites = [s for s in self.graph.sites_at(layer) if s.kind != "layer"]
            cost = cost + self.fixed(layer, option, sites)
            for site in sites:
                cost = cost + self.table(site, option)[:, -1]
        return self.in_units(cost)

    def cost_of(self, plan: Plan) -> dict[str, float]:
        """Cost of a plan per metric, from the narrowed operators themselves, not the tables."""
        kept = self.option_of(plan)
        cost = self.outside + self.selection(kept, plan)
        for layer in range(self.graph.layers):
            if layer not in plan.layers_off:
                cost = cost + self._layer_cost(plan, layer, kept)
        return self.in_units(cost)

    def _layer_cost(self, plan: Plan, layer: int, option: tuple[int, ...]) -> Costs:
        """Cost of one running layer under a plan, operator by operator; shape (4,)."""
        kept = {
            site.name: (plan.kept(site).count, site.lanes)
            for site in self.graph.sites_at(layer)
            if not plan.kept(site).everything
        }
        operators = [
            narrowed(operator, kept)
            for operator in self._by_layer.get(layer, [])
            # A block with nothing left does not run.
            if not any(kept.get(name, (1, 1))[0] == 0 for _, name in operator.narrowed_by)
        ]
        return self._vector(operators, self._around(operators), layer, option)

    @staticmethod
    def in_units(cost: Costs) -> dict[str, float]:
        """A cost vector as metric -> FLOPs, seconds or bytes."""
        whole = zip(COUNTED.items(), cost.tolist(), strict=True)
        return {metric: count if each == 1 else count / each for (metric, each), count in whole}

    def limits(self, budget: Budget) -> dict[str, int]:
        """Metric -> limit in the integer units of the tables, rounded down."""
        return limits_of(budget, self.base, self.device.late(self.graph.dtype_bytes))

    def problem(self, budget: Budget, utilities: Utilities) -> Problem:
        """The Problem: every switch's worth and cost, and the limits."""
        limits = self.limits(budget)
        rows = [list(COUNTED).index(metric) for metric in limits]
        options = self.token_options
        return self.posed(
            limits,
            utilities,
            lambda layer, sites: np.stack([self.fixed(layer, o, sites)[rows] for o in options]),
            lambda site: np.stack([self.table(site, option)[rows] for option in options]),
            [(self.outside + self.selection(option))[rows] for option in options],
        )

    def posed(
        self,
        limits: Mapping[str, int],
        utilities: Utilities,
        fixed: Callable[[int, Sequence[Site]], Costs],
        table: Callable[[Site], Costs],
        outside: Sequence[Costs],
    ) -> Problem:
        """The Problem under other limits, where things cost otherwise.

        `fixed` gives costs of a layer besides its sites, shape (token options, metrics); `table`
        those of a site, shape (token options, metrics, switches + 1); `outside` has those of
        everything else, by token option.
        """
        layers = self._choices(utilities, fixed, table)
        count = self.graph.layers
        shares = [self.share_kept(option) for option in self.token_options]
        units = {x.name for x in layers if x.optional} | {s.name for x in layers for s in x.sites}
        losses = {names: loss for names, loss in utilities.pairs.items() if set(names) <= units}
        with_tokens = [utilities.with_tokens(share, count) for share in shares]
        if losses or any(known is not None for known in with_tokens):
            # Here, since most utilities are of switches alone.
            from planner.planning.redundancy import without_gains

            losses, with_tokens = without_gains(layers, losses, with_tokens)
        tokens = tuple(
            TokenOption(option, utilities.of_tokens(share), costs, layer_losses)
            for option, share, costs, layer_losses in zip(
                self.token_options, shares, outside, with_tokens, strict=True
            )
        )
        maxima = np.array(list(limits.values()), dtype=np.int64)
        pairs = tuple(Pair(*names, loss) for names, loss in losses.items())
        return Problem(tuple(limits), maxima, tokens, layers, pairs)

    def _choices(
        self,
        utilities: Utilities,
        fixed: Callable[[int, Sequence[Site]], Costs],
        table: Callable[[Site], Costs],
    ) -> tuple[LayerChoices, ...]:
        """Every layer's switches; costs as for `posed`."""
        usable = {site.name for site in self.switches.usable(self.graph)}
        layers = []
        for layer in range(self.graph.layers):
            here = self.graph.sites_at(layer)
            sites = [s for s in here if s.kind != "layer" and s.name in usable]
            optional = any(s.kind == "layer" and s.name in usable for s in here)
            layers.append(
                LayerChoices(
                    name=f"layer.{layer}",
                    utility=utilities.of_layer(here) if optional and not sites else 0.0,
                    costs=fixed(layer, sites),
                    optional=optional,
                    sites=tuple(
                        SiteChoices(site.name, utilities.of_site(site), table(site))
                        for site in sites
                    ),
                )
            )
        return tuple(layers)

    def share_kept(self, option: tuple[int, ...]) -> float:
        """Share of image tokens that an option keeps, averaged over the layers behind a stage."""
        of = self.workload.image_tokens
        if not option or not of:
            return 1.0
        ends = [*self.stages[1:], self.graph.layers]
        covered = [end - start for start, end in zip(self.stages, ends, strict=True)]
        return sum(k / of * c for k, c in zip(option, covered, strict=True)) / sum(covered)

    def work(self) -> dict[str, float]:
        """Site name -> FLOPs of all its switches, for utilities that follow the work."""
        option = (self.workload.image_tokens,) * len(self.stages)
        work = {}
        for site in self.graph.sites:
            if site.kind == "layer":
                others = [s for s in self.graph.sites_at(site.layer) if s.kind != "layer"]
                whole = self.fixed(site.layer, option, others)[0]
                work[site.name] = float(whole + sum(self.table(s, option)[0, -1] for s in others))
            else:
                work[site.name] = float(self.table(site, option)[0, -1])
        return work


def _front(graph: Graph) -> list[Operator]:
    """What runs in front of the decoder."""
    return [o for o in graph if o.part in ("vision", "projector")]


def limits_of(budget: Budget, base: Mapping[str, float], late: float = 0.0) -> dict[str, int]:
    """Metric -> limit in the integer units of the tables, rounded down, by what the base model
    costs.

    Of what is limited to so many seconds a share is kept back by which passes may be `late`.
    """
    limits = {}
    for limit in budget.limits:
        scale = COUNTED[limit.metric]
        of = round(base[limit.metric] * scale) if limit.of_base else scale
        # No plan costs more, and tables are of 64 bits.
        if limit.metric == "latency" and not limit.of_base:
            of = round(of / (1 + late))
        limits[limit.metric] = min(math.floor(limit.value * of), COST_CEILING)
    return limits


def compared(
    costs: Mapping[str, float], base: Mapping[str, float], metrics: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Costs of a plan beside the base model's: metric -> ``{"plan", "base", "fraction"}``."""
    return {
        metric: {
            "plan": costs[metric],
            "base": base[metric],
            "fraction": costs[metric] / base[metric] if base[metric] else 1.0,
        }
        for metric in metrics
    }
