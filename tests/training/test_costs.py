"""Costs from a Problem's tables: the same rule as the solver's, and full use of real budgets."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.ir.errors import InputError
from planner.planning.compiler import compile_plan
from planner.planning.request import Request
from planner.solver import take_while_fits
from planner.solver.problem import Choice, LayerChoices, Problem, SiteChoices, TokenOption
from planner.training.estimators import parse
from planner.training.sequential_draws import log_probability, take_best
from planner.training.switch_costs import SiteCosts
from tests.problems import medium_problem, problems

SAMPLERS = ("gumbel", "gumbel-topk")


def valued(problem: Problem, option: int, logits: np.ndarray) -> Problem:
    """The problem, valued by a token option and a row of logits, in the order of `SiteCosts`."""
    tokens = (replace(t, utility=float(n == option)) for n, t in enumerate(problem.tokens))
    return replace(problem.with_utilities(logits), tokens=tuple(tokens))


def draw_logits(batch: int, switches: int, seed: int) -> torch.Tensor:
    """Many ties among them."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, switches, generator=generator)).round() / 2


def choices_of(problem: Problem, options: Iterable[int], taken: torch.Tensor) -> list[Choice]:
    """What each row says of the problem, under its token option."""
    return [problem.choice_of(row.numpy(), int(o)) for row, o in zip(taken, options, strict=True)]


def room_of(problem: Problem, options: Sequence[int]) -> torch.Tensor:
    """What the limit leaves for switches under token options."""
    return torch.from_numpy(problem.limits[0] - problem.smallest_costs()[options, 0])


def decide(logits: torch.Tensor, costs: SiteCosts, limits: torch.Tensor) -> torch.Tensor:
    """The best switches that fit, from nothing on."""
    return take_best(logits, torch.zeros_like(logits, dtype=torch.bool), costs, limits)


def leaves_no_room(problem: Problem, options: Iterable[int], taken: torch.Tensor) -> bool:
    """Whether nothing fits besides, going by the costs of whole choices."""
    for choice, row in zip(choices_of(problem, options, taken), taken, strict=True):
        if not problem.is_feasible(choice):
            return False
        for switch in (~row).nonzero()[:, 0].tolist():
            more = row.clone()
            more[switch] = True
            (other,) = choices_of(problem, [choice.token_option], more[None])
            # A switch of a layer that is off changes nothing.
            if other != choice and problem.is_feasible(other):
                return False
    return True


@given(problem=problems(metrics=1), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=150)
def test_deciding_is_the_solver_s_rule(problem, seed):
    options = np.flatnonzero(problem.smallest_costs()[:, 0] <= problem.limits[0])
    if not len(options):
        return
    costs = SiteCosts.of(problem, options)
    logits = draw_logits(len(options), problem.switches, seed)
    taken = decide(logits, costs, room_of(problem, options))
    expected = [
        take_while_fits(valued(problem, option, row.double().numpy()))
        for option, row in zip(options.tolist(), logits)
    ]
    assert choices_of(problem, options, taken) == expected


@pytest.mark.parametrize("tables", ["equal", "rounded", "stairs", "random"])
def test_deciding_is_the_solver_s_rule_on_larger_problems(tables):
    problem = medium_problem(3, tables, "gamma", alike=False)
    costs = SiteCosts.of(problem, [0, 1, 2])
    logits = draw_logits(3, problem.switches, 1)
    taken = decide(logits, costs, room_of(problem, [0, 1, 2]))
    expected = [
        take_while_fits(valued(problem, option, row.double().numpy()))
        for option, row in enumerate(logits)
    ]
    assert choices_of(problem, [0, 1, 2], taken) == expected


@pytest.mark.parametrize("name", SAMPLERS)
@given(problem=problems(metrics=1), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_samples_fit_and_leave_no_room(name, problem, seed):
    options = np.flatnonzero(problem.smallest_costs()[:, 0] <= problem.limits[0])
    if not len(options):
        return
    costs = SiteCosts.of(problem, options)
    logits = draw_logits(len(options), problem.switches, seed).requires_grad_()
    room = room_of(problem, options)
    drawn = parse(name).draw(logits, costs, room, torch.Generator().manual_seed(seed))
    assert leaves_no_room(problem, options, drawn.taken)
    (gradient,) = torch.autograd.grad(drawn.gates.sum(), logits)
    assert torch.isfinite(gradient).all()


def test_heads_wait_for_their_layer_and_log_probability_counts_who_could_be_drawn():
    """One layer with two heads, each at 3, behind an entry of 2; one of 4 without sites."""
    option = TokenOption((), 0.0, np.array([1]))
    heads = SiteChoices("heads.0", np.ones(2), np.array([[[0, 3, 6]]]))
    layers = (
        LayerChoices("layer.0", 0.0, np.array([[2]]), (heads,)),
        LayerChoices("layer.1", 0.0, np.array([[4]])),
    )
    problem = Problem(("flops",), np.array([9]), (option,), layers)
    costs = SiteCosts.of(problem)
    room = room_of(problem, [0])
    assert room.tolist() == [8]
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert costs.of_next(nothing)[0, [0, 3]].tolist() == [2, 4]
    assert (costs.of_next(nothing)[0, [1, 2]] > 1 << 61).all()
    logits = torch.tensor([[0.3, 1.0, -1.0, 0.8]])
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [0, 3, -1], [3, 0, -1], [0, 1, -1]])[:4]
    chances = log_probability(orders, logits.repeat(4, 1), costs, room.repeat(4)).exp()
    weight = logits[0].exp()
    first = weight[0] / (weight[0] + weight[3])
    then = weight[[1, 2, 3]] / weight[1:].sum()
    expected = torch.stack([first * then[0], first * then[1], first * then[2], 1 - first])
    torch.testing.assert_close(chances, expected)
    assert chances.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("model", "groups", "batch", "budget"),
    [
        *(("tiny-llava", 16, 16, budget) for budget in (0.5, 0.65, 0.85, 0.95)),
        *(("llava-7b", None, 1, budget) for budget in (0.5, 0.85)),
    ],
)
def test_real_budgets_are_used_to_99_per_cent(model, groups, batch, budget):
    """What is left is less than the cheapest switch that is off, so switches must be that small."""
    request = Request(
        model, budget, switches="layers,heads,mlp", mlp_groups=groups, time_limit_seconds=1e-3
    )
    problem = compile_plan(request).problem
    costs = SiteCosts.of(problem)
    logits = 2 * torch.randn(batch, problem.switches, generator=torch.Generator().manual_seed(0))
    room = room_of(problem, [0] * batch)
    drawn = parse("gumbel").draw(logits, costs, room, torch.Generator().manual_seed(1)).taken
    for taken in (drawn, decide(logits, costs, room)):
        for choice in choices_of(problem, [0] * batch, taken):
            used = int(problem.cost(choice)[0]) / int(problem.limits[0])
            assert 0.99 <= used <= 1


def test_several_metrics_are_refused():
    with pytest.raises(InputError, match="under one metric"):
        SiteCosts.of(medium_problem(0, "equal", "gamma", alike=True, metrics=2))
