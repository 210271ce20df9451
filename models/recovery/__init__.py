"""Losing less under a plan.

In: a model with its weights, a plan, calibration samples. Out: weights that make up for what the
plan removes, and utilities that count on it.

    moments       one calibration pass: how a site's features vary together, what errors cost
    arranging     neurons that change places, so that a plan keeps the best of them
    removal       worth of switches when the rest is refitted
    trials        that worth, held against what narrowing each site alone really costs
    refit         least squares: kept features say what removed ones did
    compensation  means of what is off, for plans that change from input to input
    recovering    one model, its samples and a way to recover: utilities and weights of plans
    healing       a short training under a plan towards the base model's outputs
    oneshot       from data to a plan and its checkpoint
"""

from planner.models.recovery.moments import Moments, site_moments
from planner.models.recovery.refit import exchange, refit, refitted, replaced, storable
from planner.models.recovery.removal import Chain, chain_of, chain_worth, removal_chain

__all__ = [
    "Chain",
    "Moments",
    "chain_of",
    "chain_worth",
    "exchange",
    "refit",
    "refitted",
    "removal_chain",
    "replaced",
    "site_moments",
    "storable",
]
