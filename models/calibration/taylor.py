"""First-order estimates: what all switches are worth from one backward pass per sample.

A gate multiplies what a switch adds; the loss expanded around gates of 1 says what a gate of 0
would do. With answers that is the first-order term, L(0) - L(1) = -dL/dg (Molchanov et al.,
"Pruning Convolutional Neural Networks for Resource Efficient Inference", arXiv 1611.06440, equation
7, here with its sign). The KL divergence from the base model has its minimum at gates of 1, so its
gradient vanishes and the first term left is half the Fisher information of the gate (Theis et al.,
"Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787, equation 6),
estimated by gradients of log-probabilities of answers drawn from the base model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from planner.ir.graph import Site
from planner.models.calibration.leave_one_out import Switch, as_gates, loss
from planner.models.calibration.replay import Replay
from planner.models.running.masked import MaskedExecutor
from planner.solver.problem import Floats

# Answers drawn per sample for the Fisher information; each needs a row's activations.
DRAWS = 4


def taylor(
    executor: MaskedExecutor, replay: Replay, switches: Sequence[Switch], kind: str, seed: int
) -> Floats:
    """Estimated effect of switching each off by itself, as `leave_one_out` for one sample.

    With ``loss`` it is signed; with ``kl`` never negative, and every row of `replay` is a draw.
    """
    sites: list[Site] = list(dict.fromkeys(switch.site for switch in switches))
    gates = {site: torch.ones(replay.rows, site.switches, requires_grad=True) for site in sites}
    with torch.enable_grad(), executor.using(as_gates(gates)):
        found = replay.log_probabilities(0)
        labels = replay.sample.labels
        if kind == "kl":
            generator = torch.Generator().manual_seed(seed)
            chances = replay.base.exp().cpu()
            drawn = torch.multinomial(chances, replay.rows, True, generator=generator)
            labels = drawn.T.to(found.device)
        total = loss(found, labels).sum()
        gradients = torch.autograd.grad(total, list(gates.values()))
    # Rows do not see one another, so row r of a gradient is that of row r's loss.
    if kind == "kl":
        # Mean over tokens of the information: their scores are uncorrelated, so the square of the
        # sum, which is (answer * gradient)^2, counts each once.
        scale = replay.sample.answer / 2
        worth = [scale * gradient.double().square().mean(0) for gradient in gradients]
    else:
        worth = [-gradient.double().mean(0) for gradient in gradients]
    by_site = dict(zip(sites, worth, strict=True))
    return np.array([float(by_site[s.site][s.index]) for s in switches])
