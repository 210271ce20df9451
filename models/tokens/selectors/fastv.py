"""FastV: drop the image tokens that the last prompt token attends to least."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from planner.kernels.ops.choose_tokens import ChooseTokens
from planner.kernels.ops.score_tokens import ScoreTokens
from planner.models.tokens.selectors.rules import (
    DecoderInputs,
    DecoderSelection,
    select_tokens,
    supplied,
)
from planner.models.tokens.selectors.scoring import visible_keys
from planner.planning.selectors import FastV


@select_tokens.register(FastV)
def fastv(selector: FastV, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """Rank each sample's image tokens by the query row of its last prompt token."""
    return best_attended(inputs, [selector.counts(n)[0] for n in inputs.image.sum(1).tolist()])


def best_attended(inputs: DecoderInputs, counts: Sequence[int | None]) -> DecoderSelection:
    """So many image tokens of each sample, those that its last prompt token attends to most."""
    query, key = supplied(inputs.query, "query"), supplied(inputs.key, "key")
    image, seq = inputs.image, inputs.image.shape[1]
    prompt = inputs.valid[:, -seq:] if inputs.prompt is None else inputs.prompt
    tokens = prompt * torch.arange(1, seq + 1, device=image.device)
    last = tokens.argmax(1, keepdim=True)
    row = query.take_along_dim(last[:, None, :, None], 2)
    visible = visible_keys(last, inputs.valid, inputs.attention_mask, seq)[:, 0]
    scale = query.shape[-1] ** -0.5 if inputs.scaling is None else inputs.scaling
    scores = ScoreTokens(row, key, visible, scale).run(triton=inputs.triton)[:, -seq:]
    wanted = image.new_tensor(counts, dtype=torch.int64)
    return DecoderSelection(~image | ChooseTokens(scores, image, wanted).run(triton=inputs.triton))
