"""How many replicas there should be: a policy for Ray Serve, which asks ten times a second.

As many as the requests fill; fewer requests are taken to fill one once deadlines are missed, so
that misses alone start another replica, which stays while there are as many requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Of the deadlines, one and this share may be missed before there are too few replicas.
_MOST_MISSED = 0.01
# Of the requests that a replica had when they were, what it is taken to be filled by from then on;
# but never less than so many requests, on average: where hardly two meet, they are not missed for
# want of replicas.
_LESS, _LEAST = 0.9, 0.5
# Seconds: how long that is remembered, and how long after a change of replicas requests that were
# accepted before may still be late.
_REMEMBERED, _SETTLING = 600.0, 10.0


def wanted_replicas(context: Any) -> tuple[float, dict[str, Any]]:
    """The number, rounded up by Ray Serve; and what is to be known the next time.

    A `ray.serve.config.AutoscalingContext` has replicas' counts ``missed`` and ``deadlines`` since
    they started, at times of the look-back period.
    """
    now, replicas = context.current_time, max(1, context.current_num_replicas)
    requests, known = context.total_num_requests, context.policy_state
    usual = full = context.config.get_target_ongoing_requests()
    after, until = known.get("after", 0.0), known.get("until", 0.0)
    if now < until:
        full = known["full"]
    if known.get("replicas") not in (None, replicas):
        after = now + _SETTLING
    counts = context.raw_metrics or {}
    missed, deadlines = (_since(after, counts.get(name, {})) for name in ("missed", "deadlines"))
    if missed > 1 + _MOST_MISSED * deadlines:
        full = min(full, max(_LEAST, _LESS * requests / replicas))
        after, until = now, now + _REMEMBERED
    known = {"replicas": replicas, "after": after, "full": full, "until": until}
    return requests / min(full, usual), known


def _since(after: float, counts: Mapping[Any, Sequence[Any]]) -> float:
    """By how much the counts of all replicas have risen since then."""
    recent = ([p.value for p in points if p.timestamp >= after] for points in counts.values())
    return float(sum(values[-1] - values[0] for values in recent if values))
