"""The governor, on machines that become slower and faster."""

import math

import numpy as np
import pytest

from planner.serving.governor import Deadline, Governor, RungTimes

# A cheap plan, a middling one and the base model.
RUNGS = [RungTimes(0.01 * share, 0.001 * share, 0.01 * share, 0.001) for share in (0.4, 0.7, 1.0)]
PROMPT, NEW = 100, 20


def took(rung, slow):
    """Seconds of a prompt, and of a token of its answer alone."""
    return slow * RUNGS[rung].prompt(PROMPT), slow * RUNGS[rung].step(1)


def serve(governor, slow_downs, deadline):
    """(rung, seconds) of one request after another, each on a machine so much slower."""
    for slow in slow_downs:
        rung = governor.choose(deadline, PROMPT, NEW, dearest=2) or 0
        prompt, token = took(rung, slow)
        governor.read([rung], [PROMPT], prompt)
        for _ in range(NEW - 1):
            governor.stepped([rung], token)
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
