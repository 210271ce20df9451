"""Learned: the tokens that a trained controller has chosen."""

from __future__ import annotations

from planner.ir.errors import InputError
from planner.models.tokens.selectors.rules import DecoderInputs, DecoderSelection, select_tokens
from planner.planning.selectors import Learned


@select_tokens.register(Learned)
def learned(selector: Learned, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """Keep what was chosen before the decoder began."""
    if inputs.chosen is None:
        raise InputError(
            "learned keeps the tokens that a trained controller chooses: run it with --scheduler"
        )
    return DecoderSelection(~inputs.image | inputs.chosen)
