"""Plans for the prompt at hand, from a frontier that is computed once.

A layer's FLOPs are a polynomial of the tokens that it computes and of the chunks that a recurrence
makes of them, and its keys and values a multiple of the tokens that stay cached. Both add up over
the layers that compute and cache as many. So all that can be switched is priced once, by term, and
what it costs on any prompt is a weighted sum of a few terms - to the last FLOP and byte what
`Pricing` says of that prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from planner.ir.cost import Workload
from planner.ir.graph import Site
from planner.ir.structure import tiles
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.compiler import keeping_whole, written
from planner.planning.pricing import Pricing, compared, limits_of
from planner.planning.scored_stages import solve_scored, unscored_stage
from planner.planning.selectors import counted
from planner.planning.utilities import Utilities
from planner.solver.exact import solve
from planner.solver.frontier import Frontier, Prices
from planner.solver.problem import COST_CEILING, Choice, Costs, ranked

# Metrics that are weighted sums of terms. Seconds are not: a roofline is no polynomial.
WEIGHED = ("flops", "kv")
# FLOPs of a layer whatever the prompt, per token, per pair of tokens, per token of an encoder's
# output and per pair of the two, per chunk and per pair of chunks; bytes per cached token.
_TERMS = ("each", "token", "pair", "encoded", "crossed", "chunk", "chunk_pair", "cached")
# The fewest tokens of a chunk that can be told from tokens.
_TOLD = 3
# Where Pricing has both, see `COUNTED`.
_FLOPS, _KV = 0, 2


@dataclass(frozen=True, order=True)
class _Span:
    """Layers that compute as many tokens, and cache as many of them."""

    stages: int  # token stages before them
    window: int  # the most tokens that they cache; 0 is no limit
    has_policy: bool  # whether a KV policy, where there is one, says what they cache


class PromptCosts:
    """What the choices for one model cost on any prompt.

    `pricing` is for a typical prompt; `keep` names what stays whole, as in a `Request`.
    """

    def __init__(
        self, pricing: Pricing, utilities: Utilities, keep: str | Sequence[str] = ()
    ) -> None:
        self.pricing, self.utilities, self.keep = pricing, utilities, keep
        graph, options = pricing.graph, pricing.token_options
        self._span_of = [_span(pricing, layer) for layer in range(graph.layers)]
        self._spans = sorted(set(self._span_of))
        # Tokens that a recurrence takes at once; where there is none, any number does.
        self._chunk = max([_TOLD, *(int(operator.get("chunk", 1)) for operator in graph)])
        self._units = self._units_of(pricing)
        names = [f"{term}.{number}" for number in range(len(self._spans)) for term in _TERMS]
        problem = pricing.posed(
            dict.fromkeys(names, COST_CEILING),
            utilities,
            lambda layer, sites: _repeated(self._fixed(layer, sites), len(options)),
            lambda site: _repeated(self._table(site), len(options)),
            [np.zeros(len(names), dtype=np.int64)] * len(options),
        )
        self.problem = keeping_whole(problem, keep)
        chosen = self.problem.sites
        self._sites = [graph.sites_by_name[site.name] for site in chosen]
        # Of the best 0, 1, ... switches of every site.
        widest = max((site.switches for site in chosen), default=0)
        self._lanes = np.zeros((len(chosen), widest + 1), dtype=np.int64)
        self._layer_terms = np.stack([layer.costs[0] for layer in self.problem.layers])
        # Of one lane; every one of a site costs the same.
        self._lane_terms = np.zeros((len(chosen), len(names)), dtype=np.int64)
        for row, (choices, site) in enumerate(zip(chosen, self._sites, strict=True)):
            widths = np.diff(site.bounds)[ranked(choices.utilities)]
            self._lanes[row, 1 : site.switches + 1] = np.cumsum(widths)
            self._lane_terms[row] = choices.costs[0, :, -1] // site.lanes
        self.frontier = Frontier(self.problem, WEIGHED, self.weights(pricing.workload, options))
        units = self._units_of(replace(pricing, switches=replace(pricing.switches, kv=None)))
        self.base = np.sum([self._fixed(n, (), units) for n in range(graph.layers)], axis=0)
        self._ends = np.stack(self._flops_terms([unit.ends[_FLOPS] for unit in self._units]))
        without = replace(self._units[0].workload, logits=0)
        self._logit = self._units[0].ends[_FLOPS] - replace(pricing, workload=without).ends[_FLOPS]

    # -- terms -------------------------------------------------------------------------------

    def _units_of(self, pricing: Pricing) -> list[Pricing]:
        """Prompts that tell terms apart: a few tokens, an encoder's beside them, more chunks."""
        more = [self._chunk * count + 1 for count in (1, 2)]
        tokens = [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (more[0], 0), (more[1], 0)]
        return [_unit(pricing, *counts) for counts in tokens]

    def _flops_terms(self, flops: Sequence[Costs]) -> list[Costs]:
        """Terms of FLOPs, as `_TERMS` has them, from those of `_units_of`."""
        one, two, three, one_beside, two_beside, *longer = flops
        pair = (three - 2 * two + one) // 2
        token = two - one - 3 * pair
        start = one - token - pair
        crossed = two_beside - two - (one_beside - one)
        # What the second chunk adds, and the second and third.
        lengths = [self._chunk * count + 1 for count in (1, 2)]
        second, both = (f - start - token * n - pair * n**2 for f, n in zip(longer, lengths))
        chunk_pair = (both - 2 * second) // 2
        chunk = second - 3 * chunk_pair
        each = start - chunk - chunk_pair
        return [each, token, pair, one_beside - one - crossed, crossed, chunk, chunk_pair]

    def _fixed(self, layer: int, sites: Sequence[Site], units: Sequence[Pricing] = ()) -> Costs:
        """Terms of a layer besides its sites, shape (terms,)."""
        costs = [unit.fixed(layer, (), sites) for unit in units or self._units]
        return self._terms(layer, costs)

    def _table(self, site: Site) -> Costs:
        """Terms of keeping 0, 1, ... switches of a site, shape (terms, switches + 1)."""
        return self._terms(site.layer, [unit.table(site, ()) for unit in self._units])

    def _terms(self, layer: int, costs: Sequence[Costs]) -> Costs:
        """Terms of a layer from what it costs with the prompts of `_units_of`."""
        kv = costs[0][_KV]
        terms = np.zeros((len(self._spans), len(_TERMS), *kv.shape), dtype=np.int64)
        row = self._spans.index(self._span_of[layer])
        terms[row] = [*self._flops_terms([cost[_FLOPS] for cost in costs]), kv]
        return terms.reshape(-1, *kv.shape)

    def terms_of(self, plan: Plan) -> Costs:
        """Terms of a plan that was made of these choices, shape (terms,)."""
        on = [layer not in plan.layers_off for layer in range(len(self._layer_terms))]
        lanes = [plan.kept(site).count if on[site.layer] else 0 for site in self._sites]
        return self._total(on, np.array(lanes, dtype=np.int64))

    def terms_of_choice(self, choice: Choice) -> Costs:
        """The same of a choice of the best switches."""
        counts = [len(choice.kept[site.name]) for site in self._sites]
        lanes = self._lanes[np.arange(len(counts)), np.array(counts, dtype=np.int64)]
        return self._total(choice.layers_on, lanes)

    def _total(self, on: Sequence[bool], lanes: Costs) -> Costs:
        total: Costs = np.array(on) @ self._layer_terms + lanes @ self._lane_terms
        return total

    def ends(self, load: Workload) -> int:
        """FLOPs of the decoder besides its layers, output embedding included."""
        flops = self._counts(load.prompt_tokens, load) @ self._ends
        return load.batch * int(flops + (load.logits - 1) * self._logit)

    def _counts(self, seen: int, load: Workload) -> npt.NDArray[np.int64]:
        """How often each term of FLOPs counts, of a sample with so many tokens."""
        beside, chunks = load.encoded_tokens, -(-seen // self._chunk)
        counts = [1, seen, seen**2, beside, seen * beside, chunks, chunks**2]
        return np.array(counts, dtype=np.int64)

    def weights(
        self, load: Workload, options: Sequence[Sequence[int]], evicts: bool = True
    ) -> Costs:
        """Weights of the terms on a prompt, shape (options, metrics, terms); see `WEIGHED`.

        `options`: image tokens left behind each stage, () where none is dropped. `evicts`: whether
        the cache does, if it may.
        """
        weights = np.zeros((len(options), len(WEIGHED), len(self._spans), len(_TERMS)), np.int64)
        policy = self.pricing.switches.kv if evicts else None
        for index, option in enumerate(options):
            for row, span in enumerate(self._spans):
                kept = option[span.stages - 1] if span.stages and option else load.image_tokens
                seen = load.text_tokens + kept
                cached = seen + load.new_tokens
                if policy is not None and span.has_policy:
                    cached = policy.kept(seen, load.new_tokens, kept)
                elif span.window:
                    cached = min(cached, span.window)
                weights[index, 0, row, :-1] = self._counts(seen, load)
                weights[index, 1, row, -1] = cached
        weights *= load.batch
        return weights.reshape(len(options), len(WEIGHED), -1)

    def on(self, load: Workload) -> OnPrompt:
        """The same on one prompt."""
        switches = self.pricing.switches
        if not self.pricing.stages:
            switches = replace(switches, axes=tuple(a for a in switches.axes if a != "tokens"))
        elif switches.selector is not None:
            per_run, of_tower = load.image_tokens_per_run, tiles(self.pricing.graph)
            counts = counted(switches.selector, load.image_tokens, per_run, of_tower)
            switches = replace(switches, token_counts=counts)
        return OnPrompt(self, self.pricing.on(load, switches))


@dataclass(frozen=True, eq=False)
class OnPrompt:
    """What choices cost on one prompt."""

    costs: PromptCosts
    pricing: Pricing  # for this prompt

    @cached_property
    def outside(self) -> int:
        """FLOPs outside the layers."""
        encoder = self.pricing.workload.encoder_flops
        if self.pricing.scope == "llm":
            encoder = 0
        elif encoder is None:
            encoder = int(self.pricing.encoder[_FLOPS])
        return encoder + self.costs.ends(self.pricing.workload)

    @cached_property
    def base(self) -> dict[str, int]:
        """FLOPs and KV bytes of the base model."""
        (weights,) = self.costs.weights(self.pricing.workload, [()], evicts=False)
        flops, kv = (weights @ self.costs.base).tolist()
        return {"flops": flops + self.outside, "kv": kv}

    def cost(self, plan: Plan) -> dict[str, int]:
        """FLOPs and KV bytes of a plan that was made of these choices for so many image tokens."""
        return self._cost(plan, self.costs.terms_of(plan))

    def _cost(self, plan: Plan, terms: Costs) -> dict[str, int]:
        option = self.pricing.option_of(plan)
        (weights,) = self.costs.weights(self.pricing.workload, [option])
        flops, kv = (weights @ terms).tolist()
        selection = int(self.pricing.selection(option, plan)[_FLOPS])
        return {"flops": flops + self.outside + selection, "kv": kv}

    def allows(self, plan: Plan, budget: Budget) -> bool:
        """Whether a plan keeps to a budget; plan as for `cost`."""
        costs = self.cost(plan)
        return all(costs[metric] <= most for metric, most in limits_of(budget, self.base).items())

    def plan(self, budget: Budget) -> Plan:
        """The best plan that is found in milliseconds; Infeasible where the budget cannot be met
        here."""
        limits, options = limits_of(budget, self.base), self._options
        solution = self.costs.frontier.at(self._prices(limits))
        keep = options[solution.choice.token_option]
        if unscored_stage(self.pricing, solution.choice, keep) is not None:
            # In as long as a compilation takes; only the lowest budgets come to this.
            problem = keeping_whole(
                self.pricing.problem(budget, self.costs.utilities), self.costs.keep
            )
            solution = solve_scored(self.pricing, problem, solve)
            keep = self.pricing.token_options[solution.choice.token_option]
        plan = written(self.pricing, solution.choice, keep, budget, self.costs.utilities)
        costs = self._cost(plan, self.costs.terms_of_choice(solution.choice))
        return replace(
            plan,
            cost=compared(costs, self.base, WEIGHED),
            utilisation={m: costs[m] / max(limit, 1) for m, limit in limits.items()},
            solver=solution.facts,
        )

    @cached_property
    def _options(self) -> list[tuple[int, ...]]:
        """Image tokens that each token option leaves behind each stage.

        Without any there is one option, the first.
        """
        if not self.pricing.stages:
            return [()]
        if self.pricing.switches.token_counts is not None:
            return list(self.pricing.token_options)
        of, typical = (p.workload.image_tokens for p in (self.pricing, self.costs.pricing))
        return [
            tuple(max(1, of * keep // typical) for keep in option)
            for option in self.costs.pricing.token_options
        ]

    def _prices(self, limits: Mapping[str, int]) -> Prices:
        rows, options = [WEIGHED.index(metric) for metric in limits], self._options
        known = self.costs.weights(self.pricing.workload, options)[:, rows]
        # Options that this prompt does not have fit no limit.
        shape = len(self.costs.problem.tokens), len(rows)
        weights = np.zeros((*shape, known.shape[2]), dtype=np.int64)
        weights[: len(options)] = known
        outside = np.full(shape, COST_CEILING, dtype=np.int64)
        selections: dict[object, int] = {}
        for index, option in enumerate(options):
            # What scoring costs depends on where tokens are dropped and among how many, no more.
            before = (self.pricing.workload.image_tokens, *option)
            drops = tuple(b if b > k else 0 for b, k in zip(before, option))
            if drops not in selections:
                selections[drops] = int(self.pricing.selection(option)[_FLOPS])
            outside[index] = np.array([self.outside + selections[drops], 0])[rows]
        return Prices(tuple(limits), np.array(list(limits.values())), weights, outside)


def _unit(pricing: Pricing, tokens: int, encoded: int) -> Pricing:
    """Pricing of one sample of a few tokens of text, none of them generated."""
    load = Workload(0, tokens, 0, encoded_tokens=encoded)
    return replace(pricing, workload=load, _layer_memo={})


def _span(pricing: Pricing, layer: int) -> _Span:
    windows = [
        operator.integer("window") - 1
        for operator in pricing.graph
        if operator.part == "decoder" and operator.layer == layer and operator.get("window")
    ]
    policy = pricing.switches.kv
    return _Span(
        sum(stage <= layer for stage in pricing.stages),
        max(windows, default=0),
        policy is not None and layer >= policy.layer,
    )


def _repeated(terms: Costs, options: int) -> npt.NDArray[np.int64]:
    """The same terms for every token option."""
    return np.broadcast_to(terms, (options, *terms.shape))
