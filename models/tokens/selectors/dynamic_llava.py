"""Dynamic-LLaVA: keep the image tokens that a trained predictor scores best."""

from __future__ import annotations

import torch

from planner.kernels.ops.choose_tokens import ChooseTokens
from planner.models.tokens.selectors.rules import (
    DecoderInputs,
    DecoderSelection,
    select_tokens,
    supplied,
)
from planner.models.tokens.selectors.scoring import pack
from planner.planning.selectors import DynamicLLaVA


@select_tokens.register(DynamicLLaVA)
def dynamic_llava(selector: DynamicLLaVA, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """Score the image tokens of each sample together, by the log-probability of "keep"."""
    states = supplied(inputs.hidden_states, "hidden_states")
    predict = supplied(inputs.image_predictor, "image_predictor")
    image = inputs.image
    places, valid = pack(image, "right")
    logits = predict(states.take_along_dim(places[..., None], 1), valid)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(dtype).log_softmax(-1)[..., 0]
    spread = torch.zeros_like(image, dtype=dtype).scatter(1, places, scores)
    counts = [selector.counts(n)[0] for n in image.sum(1).tolist()]
    wanted = image.new_tensor(counts, dtype=torch.int64)
    return DecoderSelection(~image | ChooseTokens(spread, image, wanted).run(triton=inputs.triton))
