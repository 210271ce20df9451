"""Requests that wait: who is read first, and who would be late."""

import time
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.serving.governor import Deadline, Governor, PromptSize, RungTimes
from planner.serving.jobs import Job
from planner.serving.waiting import Place, Waiting

RUNGS = (RungTimes(0.05, 0.001, 0.001, 0.02, 0.001), RungTimes(0.1, 0.002, 0.002, 0.04, 0.002))


def job(tokens=20, whole=None, arrived=None, dearest=1):
    deadline = Deadline() if whole is None else Deadline(whole=whole)
    prompt = SimpleNamespace(size=PromptSize(tokens))
    made = Job(prompt, 4, dearest, None, None, deadline=deadline)
    made.arrived = time.monotonic() if arrived is None else arrived
    if whole is not None:
        made.latest = made.arrived + Governor(RUNGS).seconds_to_spare(deadline, prompt.size, 4)
    return made


def test_the_shortest_deadline_is_read_first_and_patience_ends():
    waiting, now = Waiting(Governor(RUNGS), 2), time.monotonic()
    patient, loose, tight, again = (
        job(arrived=now),
        job(whole=5, arrived=now),
        job(whole=1, arrived=now),
        job(whole=5, arrived=now),
    )
    for each in (patient, loose, tight, again):
        waiting.add(each)
    assert list(waiting) == [tight, loose, again, patient]
    # Without a deadline it waits ten seconds at most behind those that come later.
    later = job(whole=30, arrived=now)
    waiting.add(later)
    assert list(waiting)[-2:] == [patient, later]
    waiting.remove(tight)
    assert len(waiting) == 4


def test_what_waits_is_counted_as_it_is_read():
    """Two together, and the answers that run get a token behind each pair."""
    governor = Governor(RUNGS)
    waiting = Waiting(governor, 2)
    for n in (20, 30, 40):
        waiting.add(job(tokens=n, whole=60))
    sizes = [PromptSize(n) for n in (20, 30, 40)]
    # The longer a prompt takes, the sooner it has to be read.
    pairs = [governor.prompt_seconds([0] * len(p), p) for p in (sizes[:0:-1], sizes[:1])]
    assert waiting.seconds([]) == pytest.approx(sum(pairs))
    assert sum(pairs) < sum(governor.prompt_seconds([0], [size]) for size in sizes)
    step = governor.step_seconds([1, 0])
    assert waiting.seconds([1, 0]) == pytest.approx(sum(pairs) + 2 * step)
    # What has no deadline is read under the plan that it has asked for.
    free = Waiting(governor, 2)
    free.add(job(tokens=30))
    assert free.seconds([]) == governor.prompt_seconds([1], [PromptSize(30)])


def test_seconds_to_spare_are_those_with_which_the_cheapest_plan_is_chosen():
    governor, size = Governor(RUNGS), PromptSize(30)
    for deadline in (Deadline(whole=1.0), Deadline(first_token=0.5), Deadline(1.0, 0.5, 0.2)):
        spare = governor.seconds_to_spare(deadline, size, 4, [1])
        given = {"dearest": 0, "running": [1]}
        assert governor.choose(deadline, size, 4, waited=spare - 1e-6, **given) == 0
        assert governor.choose(deadline, size, 4, waited=spare + 1e-6, **given) is None
    assert governor.seconds_to_spare(Deadline(per_token=0.001), size, 4) < 0
    assert governor.seconds_to_spare(Deadline(per_token=0.001), size, 1) > 0


@given(
    st.lists(st.tuples(st.floats(0.1, 3), st.integers(1, 200)), max_size=9),
    st.floats(0, 2),
    st.integers(1, 4),
)
def test_late_is_whoever_a_clock_says_is_late(asked, begin, together):
    governor, now = Governor(RUNGS), time.monotonic()
    waiting, jobs = Waiting(governor, together), []
    for whole, tokens in asked:
        jobs.append(job(tokens, whole, now))
        waiting.add(jobs[-1])
    wait, late, running = begin, 0, [1]
    jobs.sort(key=lambda each: each.latest)
    while jobs:
        group, jobs = jobs[:together], jobs[together:]
        late += sum(now + governor.margin.quantile * wait > each.latest for each in group)
        wait += governor.prompt_seconds([0] * len(group), [each.prompt.size for each in group])
        wait += governor.step_seconds(running)
        # Answers stay for three tokens.
        running = [*running, *[0] * len(group)][-3 * together :]
    with patch("time.monotonic", return_value=now):
        assert waiting.late(begin, [1]) == late


def test_as_many_are_expected_as_came_of_late():
    waiting, now = Waiting(Governor(RUNGS), 1), time.monotonic()
    for ago in (5.0, 0.3, 0.2, 0.1):
        waiting.note(job(whole=0.4, arrived=now - ago))
    assert len(waiting) == 0
    with patch("time.monotonic", return_value=now):
        assert waiting.late(9.0, []) == 0
        assert waiting.late(9.0, [], expecting=True) == 3
        assert waiting.late(0.0, [], expecting=True) == 0
    with patch("time.monotonic", return_value=now + 1):
        assert waiting.late(9.0, [], expecting=True) == 0


def test_one_more_may_make_another_late():
    waiting, now = Waiting(Governor(RUNGS), 1), time.monotonic()
    first = job(whole=0.4, arrived=now)
    waiting.add(first)
    assert waiting.late(0.0, []) == 0
    hurried = job(tokens=250, whole=0.55, arrived=now)
    assert hurried.latest < first.latest
    assert waiting.late(0.0, [], [Place.of(hurried)]) == 1
    assert waiting.late(0.0, [], [Place.of(job(whole=60, arrived=now))]) == 0
    assert list(waiting) == [first]


def test_a_deadline_far_away_is_kept_though_its_turn_comes_before():
    waiting, now = Waiting(Governor(RUNGS), 1), time.monotonic()
    waiting.add(job(whole=90, arrived=now))
    with patch("time.monotonic", return_value=now):
        assert waiting.late(60.0, []) == 0
        assert waiting.late(91.0, []) == 1
    free = Waiting(Governor(RUNGS), 1)
    free.add(job(arrived=now))
    with patch("time.monotonic", return_value=now):
        assert free.late(1000.0, []) == 0
