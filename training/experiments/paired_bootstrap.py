"""Differences of two methods that were asked the same questions, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating[Any]]


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
