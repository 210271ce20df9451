"""Decoder layers that return tuples, or keep a state instead of keys: left out, beside masks.

A Graph of layers alone says which modules they are, so nothing has to be lowered here.
"""

import pytest
import torch
from families import cached
from plans import plan_of
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from planner.ir.errors import InputError
from planner.ir.graph import Graph, Site
from planner.models.checking.architecture import randomised
from planner.models.checking.small_config import LAYERS, WIDTH, small_default
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.skipping import obeying

# Tuples of hidden states and attention weights (Falcon, Bloom, GPT-Neo), or of these and a position
# bias that is handed on (MPT); a state beside keys (Qwen3.5), a convolution's (LFM2), or no keys at
# all (Mamba).
TUPLES = ("falcon", "bloom", "gpt_neo", "mpt")
STATES = ("qwen3_5_text", "lfm2", "mamba")


def small_model(model_type):
    """A random model, and a Graph of its layers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_default(model_type)).float().eval()
    count = model.config.num_hidden_layers
    (path,) = (
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )
    sites = tuple(Site(f"layer.{n}", "layer", n, f"{path}.{n}") for n in range(count))
    facts = {"hidden_size": WIDTH, "decoder_layers": count, "fingerprint": "0" * 16}
    return randomised(model), Graph(model_type, (), sites, facts)


def prompt():
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model, **options):
    return model.generate(
        **prompt(),
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    ).logits


@torch.no_grad()
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("model_type", [*TUPLES, *STATES])
def test_layers_left_out_equal_layers_masked(model_type, place):
    model, graph = small_model(model_type)
    plan = plan_of(graph, layers_off=(0 if place == "first" else graph.layers - 1,))
    stock = model(**prompt()).logits
    with MaskedExecutor(model, graph).using(Gates.of([plan], graph)):
        expected = model(**prompt()).logits
    with obeying(model, graph, plan):
        actual = model(**prompt()).logits
        cached, uncached = generate(model), generate(model, use_cache=False)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(cached), torch.stack(uncached), rtol=1e-3, atol=1e-3)
    assert (actual - stock).norm() > 1e-2 * stock.norm()
    assert torch.equal(model(**prompt()).logits, stock)


@torch.no_grad()
def test_samples_of_a_batch_may_leave_out_different_layers_that_return_tuples():
    model, graph = small_model("falcon")
    both = [plan_of(graph, layers_off=(0, 2)), plan_of(graph, layers_off=(1,))]
    with MaskedExecutor(model, graph).using(Gates.of(both, graph)):
        expected = model(**prompt()).logits
    with obeying(model, graph, both):
        actual = model(**prompt()).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_weights_of_the_layers_that_run_stay_in_their_tuples():
    model, graph = small_model("falcon")
    model.set_attn_implementation("eager")
    with obeying(model, graph, plan_of(graph, layers_off=(1,))):
        weights = model(**prompt(), output_attentions=True).attentions
    assert [w is None for w in weights] == [n == 1 for n in range(LAYERS)]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "mamba"])
def test_a_cache_with_states_belongs_to_one_plan(model_type):
    model, graph = small_model(model_type)
    stock, planned = (DynamicCache(config=model.config) for _ in range(2))
    model(**prompt(), **cached(model, stock))
    with obeying(model, graph, plan_of(graph, layers_off=(1,))):
        model(**prompt(), **cached(model, planned))
    with obeying(model, graph, plan_of(graph, layers_off=(2,))):
        with pytest.raises(InputError, match="filled under another plan"):
            model(**prompt(), **cached(model, planned))
        with pytest.raises(InputError, match="filled by the base model"):
            model(**prompt(), **cached(model, stock))


@torch.no_grad()
def test_samples_share_a_state_so_they_share_a_plan():
    model, graph = small_model("mamba")
    both = [plan_of(graph, layers_off=(0,)), plan_of(graph, layers_off=(1,))]
    with obeying(model, graph, both), pytest.raises(InputError, match="one state for all samples"):
        generate(model)
