"""What estimators draw: feasible, filled up, and distributed as they say."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.ir.errors import InputError
from planner.training.estimators import ESTIMATORS, parse
from planner.training.gradient_check import fillings
from planner.training.sequential_draws import log_probability, take_best
from planner.training.subset_distributions import Subsets
from planner.training.switch_costs import AdditiveCosts

SAMPLERS = ("gumbel", "gumbel-topk", "simple", "simple:columns=7")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orders(costs: list[int], limit: int) -> list[tuple[int, ...]]:
    """All orders in which items can be drawn until none fits."""
    return [order for subset in fillings(costs, limit) for order in permutations(subset)]


@st.composite
def knapsacks(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (batch, switches), costs of the same shape, limits (batch,)."""
    batch, switches = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    scale = draw(st.sampled_from([1, 3, 10**9]))
    cost = st.integers(0, 6).map(lambda value: value * scale + value % 3)
    costs = [[draw(cost) for _ in range(switches)] for _ in range(batch)]
    limits = [draw(st.integers(0, sum(row) + 2)) for row in costs]
    logits = torch.randn(batch, switches, generator=generator(draw(st.integers(0, 99))))
    return (
        logits * draw(st.sampled_from([0.1, 3.0, 30.0])),
        torch.tensor(costs),
        torch.tensor(limits),
    )


@pytest.mark.parametrize("name", SAMPLERS)
@given(knapsack=knapsacks(), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_drawn_switches_fit_and_leave_no_room(name, knapsack, seed):
    logits, costs, limits = knapsack
    logits.requires_grad_()
    drawn = parse(name).draw(logits, AdditiveCosts(costs), limits, generator(seed))
    nothing = torch.zeros_like(costs, dtype=torch.bool)
    for taken in (drawn.taken, take_best(logits, nothing, AdditiveCosts(costs), limits)):
        left = limits - (costs * taken).sum(-1)
        assert (left >= 0).all()
        assert not (~taken & (costs <= left[:, None])).any()
    assert torch.equal(drawn.gates.detach(), drawn.taken.float())
    weights = torch.arange(1.0, logits.shape[1] + 1)
    (gradient,) = torch.autograd.grad((drawn.gates * weights).sum(), logits)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", SAMPLERS)
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_equal_costs_give_exactly_k(name, data):
    switches = data.draw(st.integers(1, 9))
    limits = torch.tensor(data.draw(st.lists(st.integers(0, switches + 1), min_size=1, max_size=4)))
    logits = torch.randn(len(limits), switches, generator=generator(data.draw(st.integers(0, 9))))
    expected = limits.clamp(max=switches)
    drawn = parse(name).draw(logits, AdditiveCosts.equal(switches), limits, generator(1))
    assert torch.equal(drawn.taken.sum(-1), expected)
    nothing = torch.zeros_like(drawn.taken)
    decided = take_best(logits, nothing, AdditiveCosts.equal(switches), limits)
    assert torch.equal(decided.sum(-1), expected)
    for row, scores, k in zip(decided, logits, expected.tolist()):
        assert set(row.nonzero()[:, 0].tolist()) == set(scores.topk(k).indices.tolist())


@given(knapsack=knapsacks())
@settings(deadline=None, max_examples=30)
def test_without_noise_what_is_drawn_is_what_is_decided(knapsack):
    logits, costs, limits = knapsack
    nothing = torch.zeros_like(logits, dtype=torch.bool)
    expected = take_best(logits.float(), nothing, AdditiveCosts(costs), limits)
    drawn = parse("gumbel:noise=0").draw(logits, AdditiveCosts(costs), limits, generator(1))
    assert torch.equal(drawn.taken, expected)
    assert torch.equal(drawn.log_probability, torch.zeros(len(logits)))


@given(knapsack=knapsacks())
@settings(deadline=None, max_examples=60)
def test_simple_s_partition_and_marginals_are_those_of_enumeration(knapsack):
    logits, costs, limits = knapsack
    logits.requires_grad_()
    subsets = Subsets.of(logits, costs, limits, columns=1 << 60 if costs.max() < 99 else 1024)
    if not subsets.exact:
        return
    marginals = subsets.marginals()
    for row in range(len(logits)):
        weights = logits[row].detach().double().numpy()
        sets = fillings(costs[row].tolist(), int(limits[row]))
        chance = np.array([weights[list(each)].sum() for each in sets])
        partition = np.logaddexp.reduce(chance)
        chance = np.exp(chance - partition)
        members = np.array([[i in each for i in range(len(weights))] for each in sets])
        assert subsets.log_partition[row].item() == pytest.approx(partition, rel=1e-9, abs=1e-9)
        np.testing.assert_allclose(marginals[row].detach(), chance @ members, atol=1e-9)


CASES = [
    ([1, 1, 1, 1, 1], 2),
    ([1, 1, 1, 1], 4),
    ([3, 1, 2, 2, 5], 5),
    ([0, 2, 7, 3, 3], 6),
    ([10, 25, 15, 40], 45),
]


@pytest.mark.parametrize(("costs", "limit"), CASES)
def test_simple_samples_what_it_says(costs, limit):
    logits = torch.tensor([0.5, -1.0, 0.3, 1.2, -0.4][: len(costs)])
    draws = 40_000
    prices = AdditiveCosts(torch.tensor([costs]))
    drawn = parse("simple").draw(
        logits.repeat(draws, 1), prices, torch.full((draws,), limit), generator(3)
    )
    sets = fillings(costs, limit)
    seen = dict.fromkeys(sets, 0)
    for row in drawn.taken.unique(dim=0):
        each = tuple(row.nonzero()[:, 0].tolist())
        seen[each] = int((drawn.taken == row).all(-1).sum())
    weights = np.exp([logits[list(each)].sum().item() for each in sets])
    expected = weights / weights.sum()
    spread = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(np.array(list(seen.values())) / draws - expected) < 4.5 * spread + 1e-9).all()
    one = drawn.taken[0].nonzero()[:, 0].tolist()
    assert drawn.log_probability[0].exp().item() == pytest.approx(expected[sets.index(tuple(one))])


@given(knapsack=knapsacks(), columns=st.sampled_from([7, 1024]))
@settings(deadline=None, max_examples=60)
def test_a_row_of_simple_does_not_depend_on_its_batch(knapsack, columns):
    logits, costs, limits = knapsack
    parsed = parse(f"simple:columns={columns}")
    seeds = range(len(logits))
    drawn = parsed.draw(logits, AdditiveCosts(costs), limits, [generator(seed) for seed in seeds])
    marginals = Subsets.of(logits.requires_grad_(), costs, limits, columns).marginals()
    for row in seeds:
        one = slice(row, row + 1)
        prices = AdditiveCosts(costs[one])
        alone = parsed.draw(logits[one], prices, limits[one], [generator(row)])
        assert torch.equal(drawn.taken[one], alone.taken)
        found = Subsets.of(logits[one], costs[one], limits[one], columns).marginals()
        torch.testing.assert_close(found, marginals[one])


@pytest.mark.parametrize("name", ["gumbel", "gumbel-topk"])
@pytest.mark.parametrize(("costs", "limit"), CASES)
def test_gumbel_draws_orders_with_their_probability(name, costs, limit):
    """Both follow Plackett-Luce, which for one noise is the Gumbel-top-k trick."""
    logits = torch.tensor([0.5, -1.0, 0.3, 1.2, -0.4][: len(costs)])
    prices, draws = AdditiveCosts(torch.tensor([costs])), 40_000
    ordered = orders(costs, limit)
    padded = torch.full((len(ordered), max(map(len, ordered))), -1)
    for row, order in zip(padded, ordered):
        row[: len(order)] = torch.tensor(order)
    limits = torch.full((len(ordered),), limit)
    chance = log_probability(padded, logits.repeat(len(ordered), 1), prices, limits).exp()
    assert chance.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = parse(name).draw(
        logits.repeat(draws, 1), prices, torch.full((draws,), limit), generator(5)
    )
    for subset in fillings(costs, limit):
        expected = sum(c for c, o in zip(chance.tolist(), ordered) if set(o) == set(subset))
        row = torch.tensor([i in subset for i in range(len(costs))])
        share = (drawn.taken == row).all(-1).float().mean().item()
        spread = max(expected * (1 - expected) / draws, 0) ** 0.5
        assert abs(share - expected) < 4.5 * spread + 1e-6
    if name == "gumbel":
        again = log_probability(
            drawn.order, logits.repeat(draws, 1), prices, torch.full((draws,), limit)
        )
        torch.testing.assert_close(drawn.log_probability, again)
        for row in range(5):
            order = tuple(drawn.order[row][drawn.order[row] >= 0].tolist())
            expected = chance[ordered.index(order)].log()
            torch.testing.assert_close(drawn.log_probability[row], expected)


def test_the_paper_s_gradient_is_that_of_every_draw_s_softmax():
    logits = torch.tensor([[0.5, -1.0, 0.3, 1.2]], requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    drawn = parse("gumbel:temperature=5").draw(
        logits, AdditiveCosts.equal(4), torch.tensor([2]), generator(0)
    )
    (found,) = torch.autograd.grad((drawn.gates * weights).sum(), logits)
    noise, expected = generator(0), torch.zeros(1, 4)
    open_switches = torch.ones(4, dtype=torch.bool)
    for pick in drawn.order[0].tolist():
        gumbel = -torch.empty(1, 4).exponential_(generator=noise).log()
        share = ((logits.detach() + gumbel) / 5).masked_fill(~open_switches, -torch.inf).softmax(-1)
        assert (logits.detach() + gumbel).masked_fill(~open_switches, -torch.inf).argmax() == pick
        expected += share * (weights - (share * weights).sum()) / 5
        open_switches[pick] = False
    torch.testing.assert_close(found, expected)


def test_deterministic_keeps_what_is_positive_and_pays_for_the_excess():
    estimator = parse("deterministic:weight=2")
    logits = torch.tensor([[1.0, -1.0, 0.5], [2.0, 1.0, 3.0]], requires_grad=True)
    costs, limits = AdditiveCosts(torch.tensor([[4, 2, 2]])), torch.tensor([7, 5])
    drawn = estimator.draw(logits, costs, limits)
    assert drawn.taken.tolist() == [[True, False, True], [True, True, True]]
    penalty = estimator.penalty(drawn.gates, costs, limits)
    assert penalty.tolist() == pytest.approx([0.0, 2 * 3 / 5])
    (gradient,) = torch.autograd.grad(penalty.sum(), logits)
    assert (gradient[0] == 0).all()
    slope = logits[1].sigmoid() * (1 - logits[1].sigmoid())
    torch.testing.assert_close(gradient[1], 2 * torch.tensor([4.0, 2.0, 2.0]) / 5 * slope)


def test_bad_arguments_are_refused():
    assert str(parse("gumbel:temperature=2")) == "gumbel:temperature=2.0"
    assert all(str(parse(name)) == name for name in ESTIMATORS)
    for text, words in [
        ("gumble", "no estimator 'gumble'"),
        ("gumbel:temperature=0", "out of range"),
        ("simple:k=3", "no field 'k'"),
        ("simple:columns=0", "out of range"),
        ("deterministic:weight=-1", "out of range"),
    ]:
        with pytest.raises(InputError, match=words):
            parse(text)
    for name in SAMPLERS:
        with pytest.raises(InputError, match="nothing to choose"):
            parse(name).draw(torch.zeros(1, 3), AdditiveCosts.equal(3), torch.tensor([-1]))
    with pytest.raises(InputError, match="int64"):
        AdditiveCosts(torch.tensor([1, 2]))
