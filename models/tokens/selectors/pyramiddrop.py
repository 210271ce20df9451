"""PyramidDrop: drop the image tokens that the next layer would attend to least, step by step."""

from __future__ import annotations

from planner.models.tokens.selectors.fastv import best_attended
from planner.models.tokens.selectors.rules import (
    DecoderInputs,
    DecoderSelection,
    select_tokens,
    supplied,
)
from planner.planning.selectors import PyramidDrop


@select_tokens.register(PyramidDrop)
def pyramiddrop(selector: PyramidDrop, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """Shares are of the image tokens that each sample had before the first step."""
    step, totals = selector.layers.index(layer), supplied(inputs.image_tokens, "image_tokens")
    counts = [selector.counts(n)[step] for n in totals.tolist()]
    return best_attended(inputs, counts, every_turn=True)
