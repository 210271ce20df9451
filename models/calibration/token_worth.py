"""What image tokens are worth: outputs at several keep fractions, and a curve through them."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from planner.ir.graph import Graph
from planner.models.calibration.leave_one_out import measure
from planner.models.calibration.replay import Replay
from planner.models.running.skipping import obeying
from planner.plan import Plan, TokenStage
from planner.solver.problem import Floats

FRACTIONS = (0.125, 0.25, 0.5, 0.75)
_SATURATION = (1e-3, 1e6)


@torch.no_grad()
def token_losses(
    graph: Graph, replay: Replay, image_tokens: int, layer: int, selector: str, kind: str
) -> Floats:
    """What dropping image tokens of a sample before a layer does, by what a selector picks.

    The replay has as many rows as there are `FRACTIONS`; `kind` is one of `MEASURES`. Returns shape
    (2, fractions): kept fractions, which are whole counts, and the loss at each.
    """
    counts = [max(1, int(image_tokens * fraction)) for fraction in FRACTIONS]
    stages = [TokenStage(layer, count, image_tokens, selector) for count in counts]
    plans = [Plan.of(graph, tokens=(stage,)) for stage in stages]
    with obeying(replay.model, graph, plans):
        found = measure(replay.log_probabilities(0), replay, kind)
    return np.array([[count / image_tokens for count in counts], found.double().tolist()])


def fit(fractions: Floats, losses: Floats) -> tuple[float, float]:
    """(worth of all image tokens, saturation) of the curve that utilities use.

    A fraction r of the tokens is worth ``tokens * log(1 + s r) / log(1 + s)``, so dropping the rest
    loses ``tokens * (1 - log(1 + s r) / log(1 + s))``. Least squares over kept fractions above 0:
    linear in `tokens`, a search over s.
    """

    def shape(saturation: float) -> Floats:
        worth: Floats = np.log1p(saturation * fractions) / np.log1p(saturation)
        return 1 - worth

    def tokens(saturation: float) -> float:
        lost = shape(saturation)
        return max(0.0, float(lost @ losses) / float(lost @ lost))

    def error(logarithm: float) -> float:
        saturation = float(np.exp(logarithm))
        return float(np.square(tokens(saturation) * shape(saturation) - losses).sum())

    low, high = np.log(_SATURATION)
    # The error may have several minima: search between neighbours of the best of a grid.
    grid = np.linspace(low, high, 64)
    best = int(np.argmin([error(point) for point in grid]))
    found = minimize_scalar(
        error, bounds=(grid[max(0, best - 1)], grid[min(63, best + 1)]), method="bounded"
    )
    saturation = float(np.exp(found.x))
    return tokens(saturation), saturation
