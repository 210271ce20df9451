"""How far an output is off, row by row, in nats per answer token."""

from __future__ import annotations

from torch import Tensor

MEASURES = ("loss", "kl")


def loss(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the answer.

    Args:
        log_probabilities: shape (rows, answer, vocabulary).
        labels: shape (answer,) or (rows, answer).

    Returns:
        Shape (rows,).
    """
    index = labels.expand(log_probabilities.shape[:2]).unsqueeze(-1)
    return -log_probabilities.gather(-1, index).squeeze(-1).mean(-1)


def divergence(log_probabilities: Tensor, base: Tensor) -> Tensor:
    """KL divergence of the output distribution from the base model's, KL(base || output).

    Args:
        log_probabilities: shape (rows, answer, vocabulary).
        base: shape (answer, vocabulary), log-probabilities.

    Returns:
        Shape (rows,).
    """
    return (base.exp() * (base - log_probabilities)).sum(-1).mean(-1)
