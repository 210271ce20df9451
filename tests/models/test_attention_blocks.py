"""Attention blocks that fuse their projections or count their heads in integers."""

import pytest
import torch
from families import TEXT, randomise
from plans import plan_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from planner.ir.errors import InputError
from planner.ir.graph import Binding, Block, Site
from planner.ir.lowering import lower_model
from planner.models.running.attention_blocks import probe
from planner.models.running.bindings import bind
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.skipping import obeying, session_on

# model type -> what differs from the common tiny configuration, and integers that must be narrowed
FUSED = {
    "phi3": ({}, {("module", "num_key_value_heads"), ("config", "num_attention_heads")}),
    "gpt2": ({"n_positions": 64}, {("module", "split_size")}),
    "gpt_neox": ({"rotary_pct": 0.5}, set()),
    "qwen3": ({}, set()),
    "starcoder2": ({}, set()),
}


def gpt2_sites(layers):
    """By hand: heads and neurons in transposed weights, queries, keys and values in one of them."""
    for layer in range(layers):
        path = f"transformer.h.{layer}"
        yield Site(f"layer.{layer}", "layer", layer, path)
        thirds = tuple(Block(64 * third, 16, 16) for third in range(3))
        yield Site(
            f"heads.{layer}",
            "heads",
            layer,
            f"{path}.attn",
            4,
            4,
            (
                Binding(f"{path}.attn.c_attn", "out", thirds),
                Binding(f"{path}.attn.c_proj", "in", thirds[:1]),
            ),
        )
        neurons = (Block(0, 1, 1),)
        yield Site(
            f"mlp.{layer}",
            "mlp",
            layer,
            f"{path}.mlp",
            256,
            1,
            (
                Binding(f"{path}.mlp.c_fc", "out", neurons),
                Binding(f"{path}.mlp.c_proj", "in", neurons),
            ),
        )


@pytest.mark.parametrize("name", FUSED)
def test_fused_projections(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **TEXT | FUSED[name][0])
    model = randomise(AutoModelForCausalLM.from_config(config), 5)
    graph = lower_model(model, name)
    if name == "gpt2":
        graph = graph.replacing(graph.operators, gpt2_sites(4))
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    plan = plan_of(graph, heads={0: (1,), 2: (0,), 3: ()}, mlp={0: (0, 3), 2: ()}, layers_off=(1,))
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    runs = []
    for context in (
        MaskedExecutor(model, graph).using(Gates.of([plan], graph)),
        obeying(model, graph, plan),
    ):
        with context:
            runs.append(model.generate(ids, **options, do_sample=False, pad_token_id=0))
    for masked, narrowed in zip(runs[0].logits, runs[1].logits, strict=True):
        assert (masked - narrowed).norm() <= 1e-5 * masked.norm()
    expected = FUSED[name][1]
    block = probe(model.get_decoder(), bind(model, graph)[0].heads, 64)
    found = {(owner, attribute) for owner, attribute, _ in block.integers}
    assert expected <= found if expected else not found


def test_a_block_that_cannot_be_narrowed_is_refused(llava):
    """A norm over all heads together does not survive fewer heads."""
    family, graph = llava
    block = family.model.model.language_model.layers[0].self_attn

    class Normed(nn.Linear):
        def forward(self, hidden):
            queries = super().forward(hidden)
            return nn.functional.layer_norm(queries, queries.shape[-1:])

    block.q_proj.__class__ = Normed
    try:
        with pytest.raises(InputError, match="q_proj computes more than a product"):
            session_on(family.model, graph).obey(plan_of(graph, heads={0: (0,)}))
    finally:
        block.q_proj.__class__ = nn.Linear
