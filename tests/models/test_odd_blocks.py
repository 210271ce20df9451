"""Blocks and caches of few families: plans by skipping beside the same plans by masks."""

import pytest
import torch
from plans import plan_of
from transformers import AutoModelForImageTextToText, EncoderDecoderCache

from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.checking.architecture import randomised
from planner.models.checking.small_config import small_default
from planner.models.checking.small_prompt import prompts_of
from planner.models.running.kv_cache import cache_among
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.skipping import obeying

# A last linear that the attention's caller owns (GIT), norms with weights for every head
# (Chameleon), a first layer that makes all layers' biases by distance, beside an encoder
# (Pix2Struct), caches of other classes (Mistral Large 4's sparse attention).
TYPES = ("git", "chameleon", "pix2struct", "mistral_large4")


@pytest.fixture(scope="module")
def known():
    """Small models by type, each with its own Graph and prompts."""
    made = {}

    def get(model_type):
        if model_type not in made:
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(small_default(model_type))
            model = randomised(model.float().eval())
            made[model_type] = model, lower_model(model, model_type), prompts_of(model)
        return made[model_type]

    return get


def narrowing(graph, lanes):
    """Some heads and neurons of every other layer, no head of another; the last layer off."""
    on = sorted({site.layer for site in graph.sites_of("heads")} - {graph.layers - 1})
    heads = {layer: lanes if layer % 2 else () for layer in on}
    mlp = {site.layer: (0, 3, 5) for site in graph.sites_of("mlp") if site.layer in on[::2]}
    last = graph.layers - 1
    off = (last,) if f"layer.{last}" in graph.sites_by_name else ()
    return plan_of(graph, layers_off=off, heads=heads, mlp=mlp)


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_a_plan_equals_its_masks_with_and_without_a_cache(model_type, known):
    model, graph, prompts = known(model_type)
    prompt = prompts.of(9)
    plan = narrowing(graph, (1, 3))

    def logits():
        # Chameleon rules out image tokens by the lowest number.
        return model(**prompt).logits.clamp(min=-1e3)

    stock = logits()
    with MaskedExecutor(model, graph).using(Gates.of([plan], graph)):
        expected = logits()
    with obeying(model, graph, plan):
        actual = logits()
        cached, uncached = (generate(model, prompt, use_cache=use) for use in (True, False))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached, uncached, rtol=1e-3, atol=1e-3)
    assert (actual - stock).norm() > 1


def generate(model, prompt, **options):
    out = model.generate(
        **prompt,
        **options,
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits).clamp(min=-1e3)


def test_a_layer_that_makes_the_biases_of_all_stays_whole(known):
    _, graph, _ = known("pix2struct")
    layers = {site.layer for site in graph.sites_of("layer")}
    assert layers == {site.layer for site in graph.sites_of("heads")} == {1, 2, 3}
    assert {site.layer for site in graph.sites_of("mlp")} == {0, 1, 2, 3}


@torch.no_grad()
def test_samples_share_what_was_encoded_so_they_share_a_plan(known):
    model, graph, prompts = known("pix2struct")
    both = [plan_of(graph, layers_off=(1,)), plan_of(graph, layers_off=(2,))]
    with obeying(model, graph, both), pytest.raises(InputError, match="was encoded for all"):
        generate(model, prompts.of(9, 9), use_cache=True)


@torch.no_grad()
def test_a_layer_that_is_off_counts_tokens_in_caches_of_unknown_classes(known):
    model, graph, prompts = known("mistral_large4")
    with obeying(model, graph, plan_of(graph, layers_off=(0,))):
        cache = model(**prompts.of(9)).cache
    assert not isinstance(cache, EncoderDecoderCache)
    assert cache_among({"cache": cache}) is cache
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths == [9 + prompts.image_tokens] * graph.layers
    assert cache.layers[0].keys.shape[1:] == (1, lengths[0], 1)


@torch.no_grad()
def test_tokens_are_not_dropped_where_the_cache_cannot_hold_some_alone(known):
    model, graph, prompts = known("mistral_large4")
    both = [plan_of(graph, layers_off=(1,)), plan_of(graph, layers_off=(2,))]
    with obeying(model, graph, both), pytest.raises(InputError, match="all samples alike"):
        model(**prompts.of(9, 9))
