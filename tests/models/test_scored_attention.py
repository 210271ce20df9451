"""Attention that tokens are scored by is the model's own, however its blocks make scores."""

import pytest
import torch
from families import llava_of
from plans import plan_of
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.running.attention_calls import RECORDING
from planner.models.running.skipping import obeying
from planner.models.tokens import token_stages
from planner.plan import TokenStage

# With bounded scores, far below what they would be; with sinks; with neither.
DECODERS = {
    "gemma2": {"attn_logit_softcapping": 0.3},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "llama": {},
}
SIDES = ["left", "right"]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_tokens_are_scored_by_the_model_s_own_attention(decoder, side, monkeypatch):
    family = llava_of({"model_type": decoder, **DECODERS[decoder]})
    model, graph = family.model, lower_model(family.model, "llava")
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            parameter.fill_(1.5)
    inputs = family.inputs(2, before=(3, 6), padding_side=side)
    seen = []

    def spy(*args):
        seen.append(inner(*args))
        return seen[-1]

    inner = token_stages._attention
    monkeypatch.setattr(token_stages, "_attention", spy)
    stage = TokenStage(2, 8, 16, "fastv:k=2,r=0.5")
    with obeying(model, graph, plan_of(graph, tokens=(stage,))) as session:
        model(**inputs)
        kept = session.implementation.kept_image_tokens
    assert kept == {2: [8, 8]}
    model.set_attn_implementation("eager")
    own = model(**inputs, output_attentions=True).attentions[1].mean(1)
    real = inputs["attention_mask"].bool()
    (layer,) = seen
    torch.testing.assert_close(layer.weights()[real], own[real], rtol=1e-5, atol=1e-6)


def test_a_bias_on_scores_is_refused_where_tokens_are_scored():
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(InputError, match="by Linear: it adds a bias to its scores"):
        ALL_ATTENTION_FUNCTIONS[RECORDING](
            torch.nn.Linear(1, 1), query, query, query, None, position_bias=torch.zeros(1, 2, 3, 3)
        )
