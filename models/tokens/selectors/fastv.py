"""FastV: drop the image tokens that the last prompt token attends to least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from planner.kernels.ops.choose_tokens import ChooseTokens
from planner.kernels.ops.score_tokens import ScoreTokens
from planner.models.tokens.selectors.rules import (
    DecoderInputs,
    DecoderSelection,
    select_tokens,
    supplied,
)
from planner.models.tokens.selectors.scoring import attention_rows, visible_keys
from planner.planning.selectors import FastV


@select_tokens.register(FastV)
def fastv(selector: FastV, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """Rank each sample's image tokens by the query row of its last prompt token."""
    return best_attended(inputs, [selector.counts(n)[0] for n in inputs.image.sum(1).tolist()])


def best_attended(
    inputs: DecoderInputs, counts: Sequence[int | None], every_turn: bool = False
) -> DecoderSelection:
    """So many image tokens of each sample, those that its last prompt token attends to most.

    With `every_turn`, where answers are being learned, on average over all tokens that one follows.
    """
    query, key = supplied(inputs.query, "query"), supplied(inputs.key, "key")
    image, seq = inputs.image, inputs.image.shape[1]
    valid = inputs.valid[:, -seq:]
    prompt = valid if inputs.prompt is None else inputs.prompt
    ends = prompt & pad((valid & ~prompt)[:, 1:], (0, 1))
    last = prompt & (prompt.flip(1).cumsum(1).flip(1) == 1)
    ends = torch.where(ends.any(1, keepdim=True), ends, last)
    turns = ends.flip(1).cumsum(1).flip(1)  # counted from the last, 1
    total: Tensor | None = None
    for turn in range(1, int(turns.max()) + 1 if every_turn else 2):
        asking = ends & (turns == turn)
        place = asking.int().argmax(1, keepdim=True)
        visible = visible_keys(place, inputs.valid, inputs.attention_mask, seq)[:, 0]
        # Samples of fewer turns have nothing to add.
        visible = visible & asking.any(1, keepdim=True)
        row = query.take_along_dim(place[:, None, :, None], 2)
        scores = _shares(row, key, visible, inputs)[:, -seq:]
        total = scores if total is None else total + scores
    assert total is not None
    wanted = image.new_tensor(counts, dtype=torch.int64)
    return DecoderSelection(~image | ChooseTokens(total, image, wanted).run(triton=inputs.triton))


def _shares(row: Tensor, key: Tensor, visible: Tensor, inputs: DecoderInputs) -> Tensor:
    """Attention of one query a sample to every key, the mean over heads: (batch, keys)."""
    rule = inputs.rule
    if rule.softcap is not None or rule.sinks is not None:
        return attention_rows(row, key, visible[:, None], rule)[:, :, 0].mean(1)
    scale = row.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    return ScoreTokens(row, key, visible, scale).run(triton=inputs.triton)
