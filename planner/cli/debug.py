"""What ``PLANNER_DEBUG`` makes ``planner compile`` tell; its levels stand in docs/debugging.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from planner.ir.errors import InputError

if TYPE_CHECKING:
    from planner.planning.compiler import Compiled

# Every level also prints what the ones below it do.
LEVELS = ("nothing", "stages", "problem and solver", "utilities", "passes", "operators")
_STAGES, _PROBLEM, _UTILITIES, PASSES, _OPERATORS = range(1, len(LEVELS))


def debug_level() -> int:
    """``PLANNER_DEBUG`` as a number from 0 to 5; InputError where it is none."""
    text = os.environ.get("PLANNER_DEBUG", "") or "0"
    if not (text.isascii() and text.isdecimal() and int(text) < len(LEVELS)):
        raise InputError(f"PLANNER_DEBUG is '{text}': give a number from 0 to {len(LEVELS) - 1}")
    return int(text)


def explain(compiled: Compiled, level: int) -> Iterator[str]:
    """Lines about a compilation, as many as the level asks for.

    The graphs between the passes (level 4) are printed by the passes as they run.
    """
    if level >= _STAGES:
        yield from _stages(compiled)
    if level >= _PROBLEM:
        yield from _problem(compiled)
    if level >= _UTILITIES:
        yield from _utilities(compiled)
    if level >= _OPERATORS:
        yield from _operators(compiled)


def _stages(compiled: Compiled) -> Iterator[str]:
    origin = {"lower": " (graph from the cache)" if compiled.from_cache else ""}
    for name, seconds in compiled.seconds.items():
        yield f"stage {name}: {seconds:.3f} s{origin.get(name, '')}"


def _problem(compiled: Compiled) -> Iterator[str]:
    problem, solution = compiled.problem, compiled.solution
    yield (
        f"problem: {problem.switches} switches, {len(problem.sites)} sites, "
        f"{len(problem.layers)} layers, {len(problem.tokens)} token options"
    )
    for metric, limit in zip(problem.metrics, problem.limits.tolist(), strict=True):
        cost = solution.cost[metric]
        yield f"limit {metric}: {cost} of {limit} used, {limit - cost} left"
    yield (
        f"solver: {solution.status}, utility {solution.utility:.12g}, bound {solution.bound:.12g}, "
        f"gap {solution.gap:.1e}, {solution.seconds:.3f} s"
    )


def _utilities(compiled: Compiled) -> Iterator[str]:
    problem, choice = compiled.problem, compiled.solution.choice
    for index, option in enumerate(problem.tokens):
        chosen = ", chosen" if index == choice.token_option else ""
        keep = ", ".join(map(str, option.keep)) or "all"
        yield f"token option {index}: keep {keep}, utility {option.utility:.6g}{chosen}"
    for layer, on in zip(problem.layers, choice.layers_on, strict=True):
        yield f"{layer.name}: {'on' if on else 'off'}, utility {layer.utility:.6g}"
        for site in layer.sites:
            worth = site.utilities
            kept = len(choice.kept[site.name])
            yield (
                f"  {site.name}: {kept} of {site.switches} kept, utility {worth.sum():.6g} in all, "
                f"{worth.min():.3g} to {worth.max():.3g} a switch"
            )


def _operators(compiled: Compiled) -> Iterator[str]:
    from planner.ir.cost import price
    from planner.planning.compiler import specialised

    pricing = compiled.pricing
    graph = specialised(compiled.graph, compiled.plan)
    sizes = pricing.workload.prefill({stage.layer: stage.keep for stage in compiled.plan.tokens})
    for operator in graph:
        cost = price(operator, graph, sizes, pricing.device)
        yield (
            f"operator {operator.name}: {operator.kind}, {cost.flops} FLOP, {cost.bytes} B, "
            f"{cost.seconds * 1e6:.3f} us, {cost.bound}"
        )
