"""IVTP: drop what the CLS token, or the text, has attended to least in a group of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from planner.kernels.ops.choose_tokens import ChooseTokens
from planner.models.tokens.selectors.rules import (
    DecoderInputs,
    DecoderSelection,
    LayerAttention,
    mark_tokens,
    select_patches,
    select_tokens,
    supplied,
)
from planner.models.tokens.selectors.scoring import descending
from planner.planning.selectors import IVTP, IVTPTower


@torch.no_grad()
def rolled_out(mixture: Tensor, layers: Sequence[LayerAttention]) -> Tensor:
    """What a mixture of tokens behind some layers is made of in front of them.

    Attention rollout: the mixture, shape (batch, seq), times the product of (A + I) / 2 over the
    layers. Returns shares of all keys, (batch, keys), 32 bits or up.
    """
    first = layers[-1].key
    dtype = torch.promote_types(first.dtype, torch.float32)
    shares = first.new_zeros(len(mixture), max(layer.key.shape[2] for layer in layers), dtype=dtype)
    shares[:, -mixture.shape[1] :] = mixture
    for layer in reversed(layers):
        seq, keys = layer.query.shape[2], layer.key.shape[2]
        moved = shares[:, None, -seq:] @ layer.weights()
        shares[:, -seq:] /= 2
        shares[:, -keys:] += moved[:, 0] / 2
    return shares


@select_patches.register(IVTPTower)
def by_cls(selector: IVTPTower, layers: Sequence[LayerAttention], keep: int) -> Tensor:
    """By the shares that patches have in the CLS token."""
    cls = layers[0].query.new_zeros(len(layers[0].query), layers[0].query.shape[2])
    cls[:, 0] = 1
    scores = rolled_out(cls, layers)[:, 1:]
    return descending(scores)[:, :keep].sort().values


@mark_tokens.register(IVTP)
@torch.no_grad()
def instruction(selector: IVTP, hidden_states: Tensor, image: Tensor, valid: Tensor) -> Tensor:
    """Text tokens behind the image that fit it no worse than their mean; without any the last."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    directions = normalize(hidden_states.to(dtype), dim=-1)
    pictures = image & valid
    picture = normalize((directions * pictures[..., None]).sum(1), dim=-1)
    fit = (directions * picture[:, None]).sum(-1)
    places = torch.arange(1, image.shape[1] + 1, device=image.device)
    last = (places * pictures).amax(1, keepdim=True)
    text = valid & ~image & (places > last)
    mean = (fit * text).sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
    end = places == (places * valid).amax(1, keepdim=True)
    # Rounding may put equal fits below their mean.
    fits = text & (fit >= mean - 1e-6)
    return torch.where(text.any(1, keepdim=True), fits, end)


@select_tokens.register(IVTP)
def by_instruction(selector: IVTP, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    """By the shares that image tokens have in the instruction's."""
    marks, image = supplied(inputs.marks, "marks"), inputs.image
    step = selector.k.index(layer)
    totals = supplied(inputs.image_tokens, "image_tokens").tolist()
    counts = image.new_tensor([selector.left_in_decoder(n)[step] for n in totals], dtype=torch.long)
    mixture = marks / marks.sum(1, keepdim=True).clamp(min=1)
    scores = rolled_out(mixture, inputs.scored)[:, -image.shape[1] :]
    chosen = ChooseTokens(scores, image, counts).run(triton=inputs.triton)
    return DecoderSelection(~image | chosen)
