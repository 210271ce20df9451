"""Decoder layers that return tuples, or keep a state instead of keys: left out, beside masks.

A Graph of layers alone says which modules they are, so most of this lowers nothing. What else makes
layers differ - weights stored transposed, biases by head, a residual inside attention - is narrowed
behind a real lowering.
"""

import copy
from unittest import mock

import pytest
import torch
from families import cached
from plans import plan_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

import planner
from planner.ir.cost import Workload
from planner.ir.cost.price import operator_flops
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Site
from planner.ir.lowering import lower_model
from planner.ir.passes import Specialise
from planner.ir.structure import without_sites
from planner.models.checking.architecture import randomised
from planner.models.checking.small_config import LAYERS, WIDTH, small_default
from planner.models.running.bindings import bind
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.session import Session
from planner.models.running.skipping import obeying

# Tuples of hidden states and attention weights (Falcon, Bloom, GPT-Neo), or of these and a position
# bias that is handed on (MPT); layers with a state among those with keys (Qwen3.5), a
# convolution's (LFM2), none with keys (Mamba), keys and a state in one (Falcon-H1).
TUPLES = ("falcon", "bloom", "gpt_neo", "mpt")
STATES = ("qwen3_5_text", "lfm2", "mamba", "falcon_h1")


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


# Weights stored transposed (GPT-2), biases by head and a residual inside the attention block
# (Bloom), biases by head that are three-dimensional (MPT), MLPs on all samples' tokens in one
# dimension (OPT), keys and values picked by index from the projection of all heads (Falcon).
BLOCKS = ("gpt2", "bloom", "mpt", "opt", "falcon")


@pytest.fixture(scope="module")
def lowered():
    """Small models by type, each with its own Graph."""
    known = {}

    def get(model_type):
        if model_type not in known:
            model, _ = small_model(model_type)
            known[model_type] = model, lower_model(model, model_type)
        return known[model_type]

    return get


def prompt():
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model, **options):
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
        **prompt(),
        **options,
    }
    return model.generate(**options).logits


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


@torch.no_grad()
def test_a_cache_with_states_beside_its_layers_is_refused_and_none_is_needed():
    """MiniMax's, whose lightning attention counts the layers that have passed."""
    model = AutoModelForCausalLM.from_config(small_default("minimax")).eval()
    graph = lower_model(model, "minimax")
    plan = plan_of(graph, heads={site.layer: () for site in graph.sites_of("heads")})
    with obeying(model, graph, plan):
        with pytest.raises(InputError, match="use_cache=False"):
            model(**prompt())
        planned = model(**prompt(), use_cache=False).logits
    assert not torch.allclose(planned, model(**prompt()).logits)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["falcon_h1", "qwen3_5_text"])
def test_a_padded_sample_beside_a_longer_one_is_continued_as_alone(model_type):
    model, graph = small_model(model_type)
    ids = prompt()["input_ids"][:1]
    mask = torch.ones_like(ids)
    both = {
        "input_ids": torch.cat([ids, nn.functional.pad(ids[:, 4:], (4, 0))]),
        "attention_mask": torch.cat([mask, nn.functional.pad(mask[:, 4:], (4, 0))]),
    }
    with obeying(model, graph, plan_of(graph, layers_off=(1, 2))):
        together = torch.stack(generate(model, **both))
        alone = torch.stack(generate(model, input_ids=ids[:, 4:], attention_mask=mask[:, 4:]))
    torch.testing.assert_close(together[:, 1:], alone, rtol=1e-3, atol=1e-3)


def narrowing(graph, heads):
    """A plan that keeps some heads and neurons of every layer but the last, and no head of one."""
    kept = {
        site.layer: heads if site.lanes > 1 else (0,)
        for site in graph.sites_of("heads")
        if site.layer < graph.layers - 1
    }
    mlp = {site.layer: (0, 3, 5) for site in graph.sites_of("mlp") if site.layer > 0}
    return plan_of(graph, heads=kept | {graph.layers - 1: ()}, mlp=mlp)


@torch.no_grad()
@pytest.mark.parametrize("model_type", BLOCKS)
def test_heads_and_neurons_left_out_equal_masked(model_type, lowered):
    model, graph = lowered(model_type)
    assert len(list(graph.sites_of("heads"))) == len(list(graph.sites_of("mlp"))) == graph.layers
    plan = narrowing(graph, (1,))
    with MaskedExecutor(model, graph).using(Gates.of([plan], graph)):
        expected = model(**prompt()).logits
    with obeying(model, graph, plan):
        actual = model(**prompt()).logits
        cached, uncached = generate(model), generate(model, use_cache=False)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(cached), torch.stack(uncached), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_groups_of_heads_that_lists_pick_from_a_projection_are_told_apart():
    """Falcon with several groups; that of BLOCKS has one."""
    config = small_default("falcon")
    config.new_decoder_architecture, config.num_kv_heads = True, 2
    model = randomised(AutoModelForCausalLM.from_config(config).eval())
    graph = lower_model(model, "falcon")
    assert {site.lanes for site in graph.sites_of("heads")} == {2}
    plan = narrowing(graph, (1,))
    with MaskedExecutor(model, graph).using(Gates.of([plan], graph)):
        expected = model(**prompt()).logits
    with obeying(model, graph, plan):
        actual = model(**prompt()).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
def test_samples_may_keep_different_heads_of_blocks_with_biases_by_head(model_type, lowered):
    model, graph = lowered(model_type)
    both = [narrowing(graph, (0,)), narrowing(graph, (1, 3))]
    with MaskedExecutor(model, graph).using(Gates.of(both, graph)):
        expected = model(**prompt()).logits
    with obeying(model, graph, both):
        actual = model(**prompt()).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt2", "bloom"])
def test_what_runs_is_what_was_priced(model_type, lowered):
    model, graph = lowered(model_type)
    model.set_attn_implementation("eager")
    plan = narrowing(graph, (1,))
    sizes = Workload(0, 9, 0).prefill()
    narrowed = Specialise(plan).apply(graph)
    ids = prompt()["input_ids"][:1]
    with obeying(model, graph, plan), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, logits_to_keep=1)
    assert counter.get_total_flops() == sum(operator_flops(o, sizes) for o in narrowed)


def test_layers_that_cannot_be_left_out_are_found_by_their_heads(lowered):
    model, graph = lowered("gpt2")
    without = without_sites(graph, [f"layer.{n}" for n in range(graph.layers)])
    assert [layer.path for layer in bind(model, without)] == [
        f"transformer.h.{n}" for n in range(4)
    ]


@torch.no_grad()
def test_what_a_model_cannot_narrow_is_not_planned(lowered):
    """Here since a block multiplies its result by what no argument says."""
    model, graph = lowered("gpt2")
    model = copy.deepcopy(model)
    block = model.transformer.h[0].attn
    stock = type(block).forward

    class Odd(type(block)):
        """Its heads cannot be told apart from outside."""

        def forward(self, hidden_states, *args, **kwargs):
            output, *others = stock(self, hidden_states, *args, **kwargs)
            return output + hidden_states.sin(), *others

    for layer in model.transformer.h:
        layer.attn.__class__ = Odd
    with mock.patch.object(Session, "graph", graph):
        planner.compile(model, 0.7, new_tokens=0)
        plan = planner.plan_of(model)
        assert not plan.heads
        assert plan.mlp or plan.layers_off
        model(**prompt())
        planner.restore(model)
