"""What switches are worth, measured on a user's own inputs: no training.

In: a stock model with its weights, its Graph with switches, samples. Out: `Calibrated`, which
becomes a utilities file for the solver. Everything is in nats per answer token.

    samples        images and prompts as model inputs with an answer behind them
    replay         one sample's forward pass, many rows at once, from any layer on
    leave_one_out  how far an output is off, with sets of switches off, one a row of a batch
    taylor         the same estimated from one backward pass
    token_worth    what image tokens are worth, and the curve through that
    pair_losses    what two layers, or tokens and a layer, lose together
    magnitude      worth by the size of weights, without data
    text           passages of text as samples
    builtin        samples for models whose user gives none
    store          partial results on disk, so that a killed run continues
    measurement    all of it in order
"""

from planner.models.calibration.leave_one_out import MEASURES
from planner.models.calibration.measurement import METHODS, Calibrated, calibrate, weights_digest
from planner.models.calibration.samples import (
    Sample,
    answered,
    read_questions,
    read_samples,
    sample_of,
)

__all__ = [
    "MEASURES",
    "METHODS",
    "Calibrated",
    "Sample",
    "answered",
    "calibrate",
    "read_questions",
    "read_samples",
    "sample_of",
    "weights_digest",
]
