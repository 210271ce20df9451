"""Assisted decoding under a plan: what is drafted changes nothing."""

import copy

import pytest
import torch
from families import cached
from plans import plan_of
from transformers import DynamicCache

from planner.ir.errors import InputError
from planner.models.running.skipping import session_on
from planner.plan import TokenStage


def with_repetition(family):
    """A prompt whose end has been there before, so that a look-up drafts in the first pass."""
    inputs = family.inputs(before=(30,), after=(12,))
    inputs["input_ids"][0, -8:] = inputs["input_ids"][0, 2:10]
    return inputs


@pytest.mark.parametrize("selector", ["fastv", "sparsevlm", "uniform", "random"])
def test_an_assistant_changes_nothing(llava, selector):
    """Drafts stand behind the prompt when its image tokens are chosen, and have no say in that."""
    family, graph = llava
    inputs = with_repetition(family)
    stages = (TokenStage(2, 9, 16, selector), TokenStage(3, 4, 16, selector))
    assistant = copy.deepcopy(family.model)
    greedy = {"do_sample": False, "max_new_tokens": 12}
    plan = plan_of(graph, layers_off=(0,), heads={1: (1,), 2: ()}, tokens=stages)
    with session_on(family.model, graph).under(plan):
        expected = family.model.generate(**inputs, **greedy)
        for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
            assert torch.equal(family.model.generate(**inputs, **greedy, **more), expected)


@pytest.mark.parametrize("before", [3, 30], ids=["within", "past"])
def test_drafts_are_taken_back_from_behind_a_sliding_window(lowered_family, before):
    """Where the window has passed tokens, too: they are held until it is known what stays."""
    family, graph = lowered_family("gemma3")
    inputs = family.inputs(before=(before,), after=(12,))
    inputs["input_ids"][0, -8:-4] = inputs["input_ids"][0, -4:]
    greedy = {"do_sample": False, "max_new_tokens": 30, "return_dict_in_generate": True}
    stages = (TokenStage(1, 9, 16, "fastv"), TokenStage(2, 4, 16, "uniform"))
    for plan in (plan_of(graph, heads={2: (1,)}), plan_of(graph, heads={1: (1,)}, tokens=stages)):
        with session_on(family.model, graph).under(plan):
            expected = family.model.generate(**inputs, **greedy)
            found = family.model.generate(**inputs, **greedy, prompt_lookup_num_tokens=3)
        assert torch.equal(found.sequences, expected.sequences)


@torch.no_grad()
def test_without_recording_nothing_is_taken_back_once_a_window_is_full(lowered_family):
    family, graph = lowered_family("gemma3")
    stages = (TokenStage(1, 9, 16, "fastv"),)
    with session_on(family.model, graph).under(plan_of(graph, tokens=stages)):
        cache = DynamicCache(config=family.model.config.get_text_config())
        family.model(**family.inputs(after=(40,)), **cached(family.model, cache))
        with pytest.raises(InputError, match="sliding window has passed"):
            cache.crop(-1)


@torch.no_grad()
def test_fastv_scores_by_the_end_of_the_prompt_and_not_by_drafts(llava):
    family, graph = llava
    inputs = family.inputs(after=(12,))
    session = session_on(family.model, graph)
    with session.under(plan_of(graph, tokens=(TokenStage(2, 5, 16, "fastv"),))):
        cache = DynamicCache()
        family.model(**inputs, **cached(family.model, cache))
        for drafts in (1, 4):
            longer = {
                name: torch.cat([inputs[name], torch.full((1, drafts), fill)], 1)
                for name, fill in (("input_ids", 77), ("attention_mask", 1))
            }
            other = DynamicCache()
            pixels = {"pixel_values": inputs["pixel_values"]}
            family.model(
                **longer, **pixels, **cached(family.model, other), logits_to_keep=1 + drafts
            )
            kept, known = (c.layers[2].parts[0].keys.positions for c in (other, cache))
            assert torch.equal(kept[:, :-drafts], known)


@pytest.mark.parametrize(
    "options", [{"assistant_early_exit": 1}, {"assistant_early_exit": 2}], ids=["one", "two"]
)
def test_the_first_layers_as_an_assistant(qwen3, options):
    family, graph = qwen3
    inputs = family.inputs(before=(9,))
    greedy = {"do_sample": False, "max_new_tokens": 8}
    for plan in (
        plan_of(graph, layers_off=(1,), heads={2: (1,)}),
        plan_of(graph, layers_off=(0,), mlp={1: (0, 3, 4)}),
    ):
        with session_on(family.model, graph).under(plan):
            expected = family.model.generate(**inputs, **greedy)
            assert torch.equal(family.model.generate(**inputs, **greedy, **options), expected)
