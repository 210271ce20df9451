"""A budget holds for the prompt that comes: what is executed never exceeds the fraction asked for.

FLOPs are those that `FlopCounterMode` counts on the executed model, KV bytes those in its cache.
"""

import pytest
import torch
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import planner
from planner.models.running.kv_cache import kv_bytes
from planner.planning.budgets import Budget
from planner.solver import Infeasible

# CLIP; tiles; windowed vision attention and grids; padding pictures that are left out; sliding
# windows; pictures that attend to each other; text alone.
NAMES = ["llava", "llava_next", "qwen2_5_vl", "smolvlm", "gemma3", "mistral3", "qwen3"]
WORKLOAD = {"image_tokens": 16, "text_tokens": 900, "new_tokens": 3, "utilities": "prior"}
# The counter knows the product that adds to a sum, but not by its name for doing it in place.
IN_PLACE = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    """A tiny random model whose every product the counter sees, compiled."""
    built = FAMILIES[request.param]()
    if request.param == "qwen2_5_vl":
        # Images of any size fit; the Graph is of the one that the config names.
        built.model.config.vision_config.image_size = 32
    built.model.set_attn_implementation("eager")
    built.model.requires_grad_(False)
    load = WORKLOAD if built.image_tokens else WORKLOAD | {"image_tokens": 0}
    planner.compile(built.model, 1.0, **load)
    return built


def flops(run, inputs, **more):
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        run(**inputs, **more)
    return counter.get_total_flops()


def cache_bytes(model, inputs):
    run = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    return kv_bytes(run.past_key_values)


def test_executed_flops_and_bytes_stay_within_the_budget(family):
    model = family.model
    # The encoder runs within the pass, or ahead of it; logits are computed for all tokens, or one.
    ways = {
        "all": (model, {}),
        "last": (model, {"logits_to_keep": 1}),
        "generate": (model.generate, {"max_new_tokens": 1, "do_sample": False}),
    }

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        batch=st.integers(1, 3),
        images=st.integers(0, 3 if family.image_tokens else 0),
        before=st.lists(st.integers(1, 60), min_size=1, max_size=2),
        after=st.lists(st.integers(1, 60), min_size=1, max_size=2),
        side=st.sampled_from(["left", "right"]),
        way=st.sampled_from(sorted(ways)),
        budget=st.sampled_from([0.8, 0.9, ["flops=0.85", "kv=0.7"], "kv=0.6"]),
    )
    def check(batch, images, before, after, side, way, budget):
        inputs = family.inputs(batch, images=images, before=before, after=after, padding_side=side)
        run, more = ways[way]
        # At budget 1 that is the base model.
        base = {"flops": flops(run, inputs, **more), "kv": cache_bytes(model, inputs)}
        with planner.budget(model, budget):
            try:
                last = planner.cost_of(model, inputs | ways["last"][1])
                cost = last if way != "all" else planner.cost_of(model, inputs)
            except Infeasible:
                # The encoder alone takes more.
                return
            ran = {"flops": flops(run, inputs, **more), "kv": cache_bytes(model, inputs)}
        for limit in Budget.of(budget).limits:
            assert ran[limit.metric] <= limit.value * base[limit.metric]
        assert cost["flops"]["base"] == base["flops"]
        # The cache is that of `generate`, which wants logits for one token: a plan of its own.
        cost = {"flops": cost["flops"], "kv": last["kv"]}
        assert ran["flops"] <= cost["flops"]["plan"]
        assert ran["kv"] <= cost["kv"]["plan"]
        if bool(inputs["attention_mask"].all()):
            assert ran["flops"] == cost["flops"]["plan"]
            # A window also passes tokens that a stage dropped, and then holds fewer.
            windows = getattr(model.config.get_text_config(), "sliding_window", None) or 0
            assert windows or ran["kv"] == cost["kv"]["plan"]
        if isinstance(budget, float):
            # A switch of these models is a large piece of them.
            assert cost["flops"]["fraction"] > budget - 0.1

    check()


@pytest.mark.parametrize("new_tokens", [1, 4])
def test_rows_of_unlike_length_store_no_more_than_a_window(new_tokens):
    """Behind a token stage, where a window ends at another column in each row."""
    family = FAMILIES["gemma3"]()
    model, window = family.model, family.model.config.text_config.sliding_window
    planner.compile(model, 1.0, **WORKLOAD)
    inputs = family.inputs(2, images=2, before=[9, 40], after=[5])
    with planner.budget(model, "kv=0.6"):
        options = {"max_new_tokens": new_tokens, "do_sample": False}
        run = model.generate(**inputs, **options, return_dict_in_generate=True)
        plan, layers = planner.plan_of(model), run.past_key_values.layers
    sliding = [layer for layer in layers if layer.is_sliding]
    assert plan.tokens[0].layer < len(layers)
    assert any(layer.parts[0].keys is not None for layer in sliding)
    assert all(layer.keys.shape[-2] < window for layer in sliding)


def test_what_encoders_did_for_a_fixed_plan_is_of_no_later_prompt(family):
    """A pass under a plan that is given reads no prompt, though its encoders run."""
    model, inputs = family.model, family.inputs()
    with planner.budget(model, 0.8):
        model(**inputs)
        expected = planner.plan_of(model)
    with planner.budget(model, expected):
        model(**inputs)
    with planner.budget(model, 0.8):
        model(**inputs)
        assert planner.plan_of(model).cost == expected.cost
