"""How many replicas are wanted, second by second, as requests come and deadlines are missed."""

import math
from types import SimpleNamespace

import pytest

from planner.serving.scaling import wanted_replicas

FULL, LOOK_BACK = 8, 30


def replicas_of(requests, most_kept, seconds=240):
    """How many there are in each second, of `requests` that run at a time.

    Of four deadlines a second all are missed by replicas that have more than `most_kept` requests.
    Either may be a function of the second.
    """
    count, state, found = 1, {}, [1]
    missed, deadlines = {0: [(0, 0)]}, {0: [(0, 0)]}
    for now in range(1, seconds):
        here = requests(now) if callable(requests) else requests
        most = most_kept(now) if callable(most_kept) else most_kept
        for replica in range(count):
            came = 4 / count
            for counts, more in ((missed, came * (here / count > most)), (deadlines, came)):
                series = counts.setdefault(replica, [(now - 1, 0)])
                series.append((now, series[-1][1] + more))

        def recent(counts, now=now, count=count):
            return {
                replica: [
                    SimpleNamespace(timestamp=at, value=value)
                    for at, value in counts[replica]
                    if at > now - LOOK_BACK
                ]
                for replica in range(count)
            }

        context = SimpleNamespace(
            current_time=float(now),
            current_num_replicas=count,
            total_num_requests=here,
            policy_state=state,
            raw_metrics={"missed": recent(missed), "deadlines": recent(deadlines)},
            config=SimpleNamespace(get_target_ongoing_requests=lambda: FULL),
        )
        wanted, state = wanted_replicas(context)
        count = min(4, max(1, math.ceil(wanted)))
        found.append(count)
    return found


def test_requests_alone_fill_replicas():
    assert replicas_of(2.5 * FULL, math.inf, 5) == [1, 3, 3, 3, 3]
    assert replicas_of(0, math.inf, 5) == [1] * 5


@pytest.mark.parametrize("requests", [1.2, 1.5, 1.9])
def test_misses_alone_start_one_more_and_no_more(requests):
    found = replicas_of(requests, most_kept=1)
    assert found[0] == 1
    assert found[-1] == 2
    assert found == sorted(found)


def test_as_many_start_as_deadlines_need():
    found = replicas_of(3.5, most_kept=1)
    assert set(found[-60:]) == {4}
    assert found == sorted(found)


def test_they_stop_with_the_load():
    assert replicas_of(lambda now: 1.5 if now < 100 else 0.6, 1)[90:120:10] == [2, 1, 1]


def test_what_a_slow_hour_has_taught_is_forgotten():
    found = replicas_of(1.5, lambda now: 1 if now < 50 else 2, seconds=700)
    assert (found[60], found[600], found[-1]) == (2, 2, 1)


def test_where_requests_hardly_meet_more_replicas_would_not_help():
    assert set(replicas_of(0.3, most_kept=0)) == {1}


def test_one_miss_is_not_too_many():
    points = [SimpleNamespace(timestamp=t, value=float(t > 5)) for t in range(10)]
    all_of = [SimpleNamespace(timestamp=t, value=float(t)) for t in range(10)]
    context = SimpleNamespace(
        current_time=10.0,
        current_num_replicas=1,
        total_num_requests=2.0,
        policy_state={},
        raw_metrics={"missed": {0: points}, "deadlines": {0: all_of}},
        config=SimpleNamespace(get_target_ongoing_requests=lambda: FULL),
    )
    assert wanted_replicas(context)[0] == 2 / FULL
