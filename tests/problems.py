"""Small random problems, and their optima found without any solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, product

import numpy as np
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from planner.solver import Frontier, Prices, Solution
from planner.solver.problem import (
    COST_CEILING,
    Choice,
    LayerChoices,
    Pair,
    Problem,
    SiteChoices,
    TokenOption,
    top,
)

__all__ = [
    "best_by_enumeration",
    "best_by_mixed_integer_program",
    "best_by_table",
    "best_by_trying",
    "best_uniform_by_enumeration",
    "frontier_of",
    "medium_problem",
    "paired_problem",
    "problems",
]

# Ties, zeros, negatives, awkward decimals and magnitudes that do not belong together.
UTILITIES = st.one_of(
    st.sampled_from([0.0, 1.0, 1.0, 2.0, -1.0, 0.1, 0.3, 1e-6, 1e6]),
    st.floats(-2, 4, allow_nan=False),
)
STEPS = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 10**13))


@st.composite
def tables(draw: st.DrawFn, options: int, metrics: int, switches: int) -> np.ndarray:
    """Costs of 0 ... switches kept: any steps, equal steps, or steps that only grow."""
    kind = draw(st.sampled_from(["any", "equal", "growing"]))
    steps = np.zeros((options, metrics, switches + 1), dtype=np.int64)
    for option, metric in product(range(options), range(metrics)):
        row = draw(st.lists(STEPS, min_size=switches + 1, max_size=switches + 1))
        if kind == "equal":
            row[1:] = [row[0]] * switches
        if kind == "growing":
            row = sorted(row)
        row[0] = draw(st.sampled_from([0, 0, row[0]]))
        steps[option, metric] = row
    return np.cumsum(steps, axis=-1)


@st.composite
def problems(draw: st.DrawFn, metrics: int | None = None, alike: bool = False) -> Problem:
    """Few enough switches to enumerate.

    Args:
        draw: hypothesis's.
        metrics: how many; none to three by default.
        alike: whether all layers have sites of the same sizes.
    """
    count = draw(st.sampled_from([1, 2, 3, 0])) if metrics is None else metrics
    options = draw(st.integers(1, 3))
    shape = st.lists(st.sampled_from([3, 4, 2, 1, 0]), min_size=1, max_size=2)
    common = draw(shape)
    layers: list[LayerChoices] = []
    for index in range(draw(st.sampled_from([3, 2, 1, 0]))):
        if layers and draw(st.booleans()):
            # A twin of the layer before: the same numbers under other names.
            twin = layers[-1]
            sites = [
                SiteChoices(f"{index}.{n}", site.utilities, site.costs, site.minimum)
                for n, site in enumerate(twin.sites)
            ]
            layers.append(
                LayerChoices(str(index), twin.utility, twin.costs, tuple(sites), twin.optional)
            )
            continue
        sites = []
        for n, switches in enumerate(common if alike else draw(shape)):
            utilities = draw(st.lists(UTILITIES, min_size=switches, max_size=switches))
            costs = draw(tables(options, count, switches))
            minimum = draw(st.sampled_from([0, 0, switches // 2, switches]))
            sites.append(SiteChoices(f"{index}.{n}", np.array(utilities), costs, minimum))
        costs = np.array(draw(st.lists(STEPS, min_size=options * count, max_size=options * count)))
        costs = costs.astype(np.int64).reshape(options, count)
        optional = draw(st.booleans())
        layers.append(LayerChoices(str(index), draw(UTILITIES), costs, tuple(sites), optional))
    tokens = []
    for option in range(options):
        costs = np.array(draw(st.lists(STEPS, min_size=count, max_size=count)), dtype=np.int64)
        tokens.append(TokenOption((options - option,), draw(UTILITIES), costs))
    free = Problem(
        tuple(f"metric{n}" for n in range(count)),
        np.zeros(count, dtype=np.int64),
        tuple(tokens),
        tuple(layers),
    )
    # From a little too little for anything to enough for everything.
    limits = []
    costs = np.concatenate([cost for cost, _ in every_choice(free)])
    for low, high in zip(costs.min(axis=0).tolist(), costs.max(axis=0).tolist()):
        share = draw(st.sampled_from([0.4, 0.6, 0.2, 0.3, 0.5, 0.7, 0.8, 0.0, 1.0, None]))
        limits.append(low - 1 if share is None else low + int((high - low) * share))
    return replace(free, limits=np.array(limits, dtype=np.int64))


def layer_variants(layer: LayerChoices, option: int) -> list[tuple[tuple[int, ...], list, float]]:
    """(sizes of its sites, cost, best utility) of a layer that is on; all subsets are tried."""
    variants = []
    for sizes in product(*(range(site.minimum, site.switches + 1) for site in layer.sites)):
        cost = layer.costs[option].copy()
        utility = layer.utility
        for site, size in zip(layer.sites, sizes):
            cost += site.costs[option, :, size]
            utility += max(sum(kept) for kept in combinations(site.utilities.tolist(), size))
        variants.append((sizes, cost.tolist(), utility))
    return variants


def every_choice(
    problem: Problem, sizes: tuple[int, ...] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Costs (choices, metrics) and utilities (choices,) of all choices, per token option.

    With `sizes`, only choices whose running layers, if they have sites, keep so many switches.
    """
    metrics = len(problem.metrics)
    for option, token in enumerate(problem.tokens):
        cost, utility = token.costs[None], np.array([token.utility])
        for layer in problem.layers:
            variants = [
                (price, worth)
                for kept, price, worth in layer_variants(layer, option)
                if sizes is None or kept in ((), sizes)
            ]
            if layer.optional:
                variants.append(([0] * metrics, 0.0))
            prices = np.array([price for price, _ in variants], dtype=np.int64)
            worths = np.array([worth for _, worth in variants])
            prices = prices.reshape(len(variants), metrics)
            cost = (cost[:, None] + prices).reshape(len(cost) * len(prices), metrics)
            utility = (utility[:, None] + worths).reshape(-1)
        yield cost, utility


def best_by_enumeration(problem: Problem, sizes: tuple[int, ...] | None = None) -> float | None:
    """The largest utility of all choices that fit, None if there is none."""
    found = [
        utility[(cost <= problem.limits).all(axis=1)]
        for cost, utility in every_choice(problem, sizes)
    ]
    best = np.concatenate(found)
    return float(best.max()) if len(best) else None


def best_uniform_by_enumeration(problem: Problem) -> float | None:
    """The same over choices with equal counts in all running layers."""
    shape = next((layer.sites for layer in problem.layers if layer.sites), ())
    sets = product(*(range(site.switches + 1) for site in shape))
    found = [best_by_enumeration(problem, sizes) for sizes in sets]
    return max((best for best in found if best is not None), default=None)


def best_by_table(problem: Problem) -> float:
    """The largest utility within the one limit, by dynamic programming over every cost up to it.

    For problems too large to enumerate. Costs must be small numbers.
    """
    best = -np.inf
    for option, token in enumerate(problem.tokens):
        room = int(problem.limits[0] - token.costs[0])
        if room < 0:
            continue
        table = np.zeros(room + 1)
        for layer in problem.layers:
            on = best_sums(table, [(int(layer.costs[option, 0]), layer.utility)])
            for site in layer.sites:
                sums = np.concatenate([[0], np.cumsum(-np.sort(-site.utilities))])
                points = list(zip(site.costs[option, 0].tolist(), sums.tolist()))
                on = best_sums(on, points[site.minimum :])
            table = np.maximum(on, table) if layer.optional else on
        best = max(best, token.utility + float(table[-1]))
    return float(best)


def best_sums(table: np.ndarray, points: list[tuple[int, float]]) -> np.ndarray:
    """Best utility within every cost once one (cost, utility) point is added."""
    found = np.full(len(table), -np.inf)
    for cost, utility in points:
        if cost < len(table):
            found[cost:] = np.maximum(found[cost:], table[: len(table) - cost] + utility)
    return found


def best_by_mixed_integer_program(problem: Problem) -> float:
    """The largest utility according to HiGHS, one Boolean per count of a site.

    For several limits. HiGHS computes in floating point: costs must be small numbers.
    """
    best = -np.inf
    for option, token in enumerate(problem.tokens):
        room = problem.limits - token.costs
        utility, cost, rows = [], [], []
        layers = len(problem.layers)
        for layer in problem.layers:
            utility.append(layer.utility)
            cost.append(layer.costs[option])
        for index, layer in enumerate(problem.layers):
            for site in layer.sites:
                sums = np.concatenate([[0], np.cumsum(-np.sort(-site.utilities))])
                row = {index: -1.0}
                for count in range(site.minimum, site.switches + 1):
                    row[len(utility)] = 1.0
                    utility.append(sums[count])
                    cost.append(site.costs[option, :, count])
                rows.append(row)
        share = np.zeros((len(rows), len(utility)))
        for number, row in enumerate(rows):
            share[number, list(row)] = list(row.values())
        must = [float(not layer.optional) for layer in problem.layers]
        answer = milp(
            -np.array(utility),
            constraints=[
                LinearConstraint(np.array(cost).T, ub=room),
                LinearConstraint(share, lb=0, ub=0),
            ],
            integrality=np.ones(len(utility)),
            bounds=Bounds(np.array(must + [0.0] * (len(utility) - layers)), 1),
            options={"mip_rel_gap": 0.0},
        )
        if answer.success:
            best = max(best, token.utility - answer.fun)
    return float(best)


def medium_problem(
    seed: int, tables: str, utilities: str, alike: bool, metrics: int = 1
) -> Problem:
    """Six layers of 6 + 8 switches and three token options.

    Args:
        seed: of all random numbers.
        tables: ``equal`` steps; ``rounded``, equal but for a little; ``stairs``, where every third
            step costs; ``random`` steps.
        utilities: ``gamma``, ``whole`` numbers or ``uniform``.
        alike: whether all layers have the same tables.
        metrics: how many; heads cost less in every other one, and MLP groups more.
    """
    rng = np.random.default_rng(seed)
    draws = {
        "gamma": lambda size: rng.gamma(1.0, size=size),
        "whole": lambda size: rng.integers(-1, 6, size=size).astype(np.float64),
        "uniform": lambda size: np.ones(size),
    }
    worth = draws[utilities]

    def table(switches: int, price: float) -> np.ndarray:
        counts = np.arange(switches + 1)
        if tables == "equal":
            return counts * round(price)
        if tables == "rounded":
            steps = round(100 * price) + rng.integers(0, 5, switches)
            return np.concatenate([[0], np.cumsum(steps)])
        if tables == "stairs":
            return -(-counts // 3) * round(3 * price) + (counts > 0) * 2
        return np.concatenate([[0], np.cumsum(rng.integers(0, round(2 * price) + 1, switches))])

    def tables_of(switches: int, price: float, change: float) -> np.ndarray:
        prices = [price * change**metric for metric in range(metrics)]
        return np.stack(
            [
                np.stack([table(switches, scale * each) for each in prices])
                for scale in (1.0, 0.8, 0.6)
            ]
        )

    def sites_of() -> tuple[np.ndarray, np.ndarray]:
        return tables_of(6, 5.0, 0.6), tables_of(8, 8.0, 1.3)

    shared = sites_of()
    layers = []
    for index in range(6):
        heads, groups = shared if alike else sites_of()
        sites = (
            SiteChoices(f"heads.{index}", worth(6), heads, minimum=index % 2),
            SiteChoices(f"mlp.{index}", worth(8), groups),
        )
        costs = np.tile(np.array([[5], [4], [3]]), (1, metrics))
        layers.append(LayerChoices(str(index), float(worth(1)[0]), costs, sites, index != 1))
    outside = np.full(metrics, 7)
    tokens = [TokenOption((keep,), keep * 5.0, outside) for keep in (8, 6, 4)]
    most = outside + sum(
        layer.costs[0] + sum(site.costs[0, :, -1] for site in layer.sites) for layer in layers
    )
    limits = (most * rng.uniform(0.35, 0.7, metrics)).astype(np.int64)
    names = tuple(f"metric{metric}" for metric in range(metrics))
    return Problem(names, limits, tuple(tokens), tuple(layers))


def paired_problem(seed: int) -> Problem:
    """Up to four layers of one or two small sites, any pairs among layers and sites."""
    rng = np.random.default_rng(seed)
    metrics, options = int(rng.integers(1, 3)), int(rng.integers(1, 3))

    def table(*shape: int) -> np.ndarray:
        return rng.integers(0, 9, shape)

    layers = []
    for index in range(int(rng.integers(2, 5))):
        sites = []
        for kind in ("heads", "mlp")[: int(rng.integers(0, 3))]:
            switches = int(rng.integers(1, 4))
            costs = np.cumsum(table(options, metrics, switches + 1), axis=-1)
            worth = rng.normal(0.5, 1, switches).round(int(rng.integers(0, 4)))
            sites.append(SiteChoices(f"{kind}.{index}", worth, costs, int(rng.integers(0, 2))))
        layers.append(
            LayerChoices(
                f"layer.{index}",
                float(rng.normal(0.5, 1)),
                table(options, metrics),
                tuple(sites),
                bool(rng.integers(0, 4)),
            )
        )
    tokens = tuple(
        TokenOption(
            (n,),
            float(rng.normal()),
            table(metrics),
            rng.normal(0, 1, len(layers)) if rng.integers(0, 2) else None,
        )
        for n in range(options)
    )
    units = [x.name for x in layers] + [s.name for x in layers for s in x.sites]
    pairs = tuple(
        Pair(a, b, round(float(rng.normal(0, 1)), int(rng.integers(0, 6))))
        for a, b in combinations(units, 2)
        if rng.integers(0, 3)
    )
    free = Problem(tuple("ab"[:metrics]), np.zeros(metrics, np.int64), tokens, tuple(layers), pairs)
    most = free.cost(Choice.everything(free))
    least = free.smallest_costs().max(axis=0)
    share = rng.random()
    limits = np.maximum(least, (least + (most - least) * share).astype(np.int64))
    return replace(free, limits=limits.astype(np.int64))


def best_by_trying(problem: Problem) -> float:
    """The utility of the best of all choices; which switches of a site is a matter of utility."""
    per_layer = []
    for layer in problem.layers:
        ways = [
            (True, dict(zip([s.name for s in layer.sites], kept)))
            for kept in product(
                *(
                    [top(s.utilities, n) for n in range(s.minimum, s.switches + 1)]
                    for s in layer.sites
                )
            )
        ]
        if layer.optional:
            ways.append((False, {site.name: () for site in layer.sites}))
        per_layer.append(ways)
    best = -np.inf
    for option in range(len(problem.tokens)):
        for ways in product(*per_layer):
            kept = {name: some for _, sites in ways for name, some in sites.items()}
            choice = Choice(option, tuple(on for on, _ in ways), kept)
            if (problem.cost(choice) <= problem.limits).all():
                best = max(best, problem.utility(choice))
    return float(best)


def frontier_of(problem: Problem, metric: str) -> Callable[[int], Solution]:
    """Answers for any limit of one metric, with the problem's own limits of the others.

    Its terms are the metrics themselves.
    """
    outside = np.stack([token.costs for token in problem.tokens])
    ceilings = np.full(len(problem.metrics), COST_CEILING, dtype=np.int64)
    tokens = tuple(replace(token, costs=np.zeros_like(token.costs)) for token in problem.tokens)
    one = np.eye(len(problem.metrics), dtype=np.int64)
    row = problem.metrics.index(metric)
    every = np.tile(one, (len(tokens), 1, 1))
    limitless = replace(problem, limits=ceilings, tokens=tokens)
    frontier = Frontier(limitless, problem.metrics, every)

    def at(limit: int) -> Solution:
        limits = problem.limits.copy()
        limits[row] = limit
        return frontier.at(Prices(problem.metrics, limits, every, outside))

    return at
