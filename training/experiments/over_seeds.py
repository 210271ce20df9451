"""Results of several seeds summed up: means with spreads, and differences with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating[Any]]
Row = Mapping[str, Any]


def grouped(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by what they have under some names, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def means(
    rows: Sequence[Row], names: Sequence[str], measures: Sequence[str]
) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    """Rows that differ in their seed alone, as one, and what it stands for.

    It has their mean of every measure, its standard deviation as ``<measure>_spread``, and the mean
    accuracy by family.
    """
    for key, members in grouped(rows, *names).items():
        entry: dict[str, Any] = dict(zip(names, key, strict=True))
        for measure in measures:
            values = [float(member[measure]) for member in members]
            entry[measure] = mean(values)
            entry[f"{measure}_spread"] = stdev(values) if len(values) > 1 else 0.0
        families = members[0]["families"]
        entry["families"] = {f: mean(m["families"][f] for m in members) for f in families}
        yield entry, members


def paired_bootstrap(pairs: Sequence[Scores], resamples: int = 2000) -> dict[str, float]:
    """Mean difference over runs, its standard error, and the 95 % interval from `low` to `high`.

    `pairs`: differences question by question, an array for each run. Runs are resampled, and in
    each the questions. `resamples`: how often.
    """
    random = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        chosen = [pairs[i] for i in random.integers(len(pairs), size=len(pairs))]
        means.append(np.mean([random.choice(p, len(p)).mean() for p in chosen]))
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return {
        "difference": float(np.mean([pair.mean() for pair in pairs])),
        "standard_error": float(np.std(means)),
        "low": low,
        "high": high,
    }
