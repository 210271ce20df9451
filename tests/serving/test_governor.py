"""The governor, on machines that become slower and faster."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.serving.governor import Deadline, Governor, PromptSize, RungTimes

# A cheap plan, a middling one and the base model.
RUNGS = [
    RungTimes(0.01 * share, 0.001 * share, 0.0, 0.01 * share, 0.001) for share in (0.4, 0.7, 1.0)
]
PROMPT, NEW = PromptSize(100), 20


def took(rung, slow):
    """Seconds of a prompt, and of a token of its answer alone."""
    return slow * RUNGS[rung].prompt(PROMPT), slow * RUNGS[rung].step(1)


def serve(governor, slow_downs, deadline):
    """(rung, seconds) of one request after another, each on a machine so much slower."""
    for slow in slow_downs:
        rung = governor.choose(deadline, PROMPT, NEW, dearest=2) or 0
        prompt, token = took(rung, slow)
        expected = governor.expect([rung], [PROMPT])
        governor.read([rung], [PROMPT], prompt)
        for _ in range(NEW - 1):
            governor.stepped([rung], token)
        governor.finished(expected, NEW, prompt + token * (NEW - 1))
        yield rung, prompt + token * (NEW - 1)


def test_an_idle_machine_runs_the_whole_model_and_a_bound_one_less():
    governor = Governor(RUNGS)
    whole = sum(took(2, 1.0)[:1]) + (NEW - 1) * took(2, 1.0)[1]
    assert governor.choose(Deadline(whole * 1.2), PROMPT, NEW, dearest=2) == 2
    assert governor.choose(Deadline(whole * 1.2), PROMPT, NEW, dearest=1) == 1
    assert governor.choose(Deadline(whole * 0.8), PROMPT, NEW, dearest=2) == 1
    assert governor.choose(Deadline(whole * 0.1), PROMPT, NEW, dearest=2) is None
    assert not governor.is_possible(Deadline(whole * 0.1), PROMPT, NEW)


@pytest.mark.parametrize("slow", [2.0, 0.5])
def test_the_second_request_after_a_step_is_planned_with_the_new_speed(slow):
    rng = np.random.default_rng(0)
    noise = np.exp(rng.normal(0, 0.02, 120))
    idle = took(2, 1.0)[0] + (NEW - 1) * took(2, 1.0)[1]
    deadline = Deadline(idle * 1.25)
    run = list(serve(Governor(RUNGS), np.r_[np.ones(60), np.full(60, slow)] * noise, deadline))
    assert all(seconds <= deadline.whole for _, seconds in (*run[:60], *run[61:]))
    # And it is the dearest plan that keeps it, always the same: no oscillation.
    best = max(
        rung for rung in range(3)
        if slow * (took(rung, 1.0)[0] + (NEW - 1) * took(rung, 1.0)[1]) <= deadline.whole
    )  # fmt: skip
    assert {rung for rung, _ in run[62:]} == {best}


def test_each_objective_counts_by_itself():
    governor = Governor(RUNGS)
    prompt, token = took(1, 1.1)
    assert governor.choose(Deadline(first_token=prompt), PROMPT, NEW, dearest=2) == 1
    assert governor.choose(Deadline(per_token=token), PROMPT, NEW, dearest=2) == 1
    assert governor.choose(Deadline(per_token=0), PROMPT, 1, dearest=2) == 2
    assert governor.choose(Deadline(first_token=prompt), PROMPT, NEW, dearest=2, waited=1) is None
    assert not Deadline().is_set
    assert Deadline(whole=math.inf, per_token=1).is_set


def test_answers_of_other_plans_cost_steps_of_their_own():
    governor = Governor(RUNGS)
    assert governor.step_seconds([0, 2]) == pytest.approx(
        RUNGS[0].step(1) + RUNGS[2].step(1), rel=0.01
    )
    assert governor.step_seconds([2, 2]) == pytest.approx(RUNGS[2].step(2), rel=0.01)


@pytest.mark.parametrize("new", [2, NEW])
@pytest.mark.parametrize("noise", [0.02, 0.06])
@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_machine_that_becomes_slower_keeps_its_promise(new, noise, seed):
    """Single passes vary; in answers of one step as in longer ones the step shows at once."""
    rng, governor = np.random.default_rng(seed), Governor(RUNGS)
    whole = [took(rung, 1)[0] + (new - 1) * took(rung, 1)[1] for rung in range(3)]
    deadline = Deadline(1.4 * whole[2])
    kept, picked = [], []
    for number in range(400):
        slow = 1 + (100 <= number < 300)
        rung = governor.choose(deadline, PROMPT, new, dearest=2) or 0
        expected = governor.expect([rung], [PROMPT])
        prompt, token = took(rung, slow * np.exp(noise * rng.standard_normal()))
        tokens = token * np.exp(2 * noise * rng.standard_normal(new - 1))
        governor.read([rung], [PROMPT], prompt)
        for one in tokens:
            governor.stepped([rung], one)
        governor.finished(expected, new, prompt + tokens.sum())
        kept.append(prompt + tokens.sum() <= deadline.whole)
        picked.append(rung)
    assert all(kept[101:106])
    assert all(kept[301:306])
    assert np.mean(kept) >= 0.97
    # In each state of the machine one plan is run, but for a few requests.
    for begin, end, rung in ((20, 100, 2), (120, 300, 0), (320, 400, 2)):
        assert np.mean(np.array(picked[begin:end]) == rung) >= 0.9


sizes = st.builds(PromptSize, st.integers(1, 2000), st.integers(0, 2000))
ratios = st.floats(0.05, 50)


@given(st.lists(st.tuples(st.integers(0, 2), sizes, ratios), max_size=30), sizes, st.data())
def test_whatever_it_has_seen_it_goes_by_what_it_predicts(seen, prompt, data):
    governor = Governor(RUNGS)
    for rung, size, ratio in seen:
        expected = governor.expect([rung], [size])
        governor.read([rung], [size], ratio * RUNGS[rung].prompt(size))
        governor.stepped([rung], ratio * RUNGS[rung].step(1))
        governor.finished(expected, 2, ratio * (RUNGS[rung].prompt(size) + RUNGS[rung].step(1)))
    for factor in (governor.prompts.median, governor.tokens.median, governor.margin.quantile):
        assert 0 < factor < math.inf
    seconds = data.draw(st.floats(1e-3, 100))
    chosen = governor.choose(Deadline(seconds), prompt, NEW, dearest=2)
    # More time never makes it cheaper, waiting never dearer.
    more = governor.choose(Deadline(2 * seconds), prompt, NEW, dearest=2)
    late = governor.choose(Deadline(seconds), prompt, NEW, dearest=2, waited=seconds / 2)
    order = [-1 if rung is None else rung for rung in (late, chosen, more)]
    assert order == sorted(order)
    if chosen is not None:
        assert governor.expect([chosen], [prompt]).seconds(NEW) <= seconds


def test_a_request_during_which_the_machine_changes_says_nothing_about_how_much_requests_vary():
    governor = Governor(RUNGS)
    expected = governor.expect([2], [PROMPT])
    before = governor.margin.variance
    governor.read([2], [PROMPT], 3 * RUNGS[2].prompt(PROMPT))
    governor.finished(expected, 1, 3 * RUNGS[2].prompt(PROMPT))
    assert governor.margin.variance == before
    # Answers are slower as well from then on.
    assert governor.step_seconds([2]) == pytest.approx(3 * RUNGS[2].step(1))
