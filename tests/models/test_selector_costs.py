"""What selectors cost: a plan's price is never below what runs, and reports say what really ran."""

import functools
import tempfile
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from plans import plan_of
from predictors import write_predictors
from torch.utils.flop_counter import FlopCounterMode

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.ir.structure import tiles
from planner.models.running.kv_cache import cache_among, kv_bytes
from planner.models.running.skipping import session_on
from planner.planning.compiler import plan_graph
from planner.planning.plan_costs import PlanCosts
from planner.planning.request import Request
from planner.planning.selectors import Sizes, parse, stages_of

ADAPTIVE = ["prumerge:max=0.2", "prumerge:max=0.7", "prumerge+:max=0.3", "prumerge+:max=0.9"]
FIXED = [
    "pyramiddrop:k=1/3,ratio=0.5/0.25",
    "fastv:k=1,r=0.4", "sparsevlm:after=0/2,keep=9/3", "sparsevlm:after=1,keep=0,recycle=false",
    "random:keep=5", "uniform:keep=7,k=2", "prumerge+:ratio=0.25",
    "visionzip:dominant=4,contextual=2", "hired:ratio=0.3", "dart:keep=8,k=1", "divprune:ratio=0.3",
    "divprune:ratio=0.5,k=2", "dynamic-llava:FOLDER,ratio=0.3", "fastervlm:keep=5",
    "vispruner:keep=5", "downsample:side=3",
]  # fmt: skip


@functools.cache
def prepared():
    """A tiny random model whose every product the counter sees, its Graph and an session."""
    family = FAMILIES["llava"]()
    graph = lower_model(family.model, "llava")
    family.model.set_attn_implementation("eager")
    family.model.requires_grad_(False)
    return family, graph, session_on(family.model, graph)


@functools.cache
def predictors():
    """A folder that stays for the session."""
    folder = tempfile.TemporaryDirectory()
    write_predictors(folder.name, 64)
    return folder


def planned(graph, text, budget, images, words, batch, switches="all"):
    text = text.replace("FOLDER", predictors().name)
    request = Request(
        "llava", budget, switches=switches, tokens=text, image_tokens=16 * images,
        text_tokens=words, new_tokens=2, batch=batch,
    )  # fmt: skip
    return plan_graph(graph, request).plan


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.sampled_from(ADAPTIVE + FIXED),
    seed=st.integers(0, 99),
    images=st.integers(1, 3),
    batch=st.integers(1, 3),
    budget=st.sampled_from([1.0, 0.85]),
)
@example(text="prumerge+:max=0.9", seed=0, images=2, batch=3, budget=1.0)
@example(text="prumerge:max=0.7", seed=1, images=1, batch=1, budget=1.0)
@example(text="pyramiddrop:k=1/3,ratio=0.5/0.25", seed=0, images=2, batch=2, budget=1.0)
@example(text="pyramiddrop:k=1/3,ratio=0.5/0.25", seed=0, images=1, batch=1, budget=0.85)
@example(text="dart:keep=8,k=1", seed=0, images=2, batch=2, budget=1.0)
@example(text="divprune:ratio=0.3", seed=0, images=1, batch=2, budget=1.0)
@example(text="dynamic-llava:FOLDER,ratio=0.3", seed=0, images=2, batch=2, budget=0.85)
@example(text="vispruner:keep=5", seed=0, images=2, batch=1, budget=1.0)
def test_a_prompt_never_costs_more_than_its_plan_says(text, seed, images, batch, budget):
    family, graph, session = prepared()
    inputs = family.inputs(batch, seed, images=images)
    prompt = inputs["input_ids"].shape[1]
    plan = planned(graph, text, budget, images, prompt - 16 * images, batch)
    assert plan.cost["flops"]["fraction"] <= budget
    with session.under(plan):
        counter = FlopCounterMode(display=False)
        with counter:
            family.model(**inputs, logits_to_keep=1)
        kept = session.implementation.kept_image_tokens
        run = family.model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
    assert counter.get_total_flops() <= plan.cost["flops"]["plan"]
    assert kv_bytes(cache_among(run)) <= plan.cost["kv"]["plan"]
    for stage in plan.tokens:
        assert max(kept[stage.layer]) <= stage.keep
    load = Workload.default(graph, 16 * images, prompt - 16 * images, 2, batch)
    most = {layer: max(counts) for layer, counts in kept.items()}
    ran = PlanCosts(graph, load).of(plan, most)
    assert counter.get_total_flops() <= ran["flops"]["plan"] <= plan.cost["flops"]["plan"]
    assert kv_bytes(cache_among(run)) == ran["kv"]["plan"]
    assert ran["flops"]["base"] == plan.cost["flops"]["base"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ADAPTIVE)
@torch.no_grad()
def test_ragged_counts_are_those_of_samples_alone(text, side):
    family, graph, session = prepared()
    inputs = family.inputs(4, 5, images=2, before=(3, 1, 6), padding_side=side)
    plan = planned(graph, text, 1.0, 2, 12, 4)
    with session.under(plan):
        family.model(**inputs)
        together = session.implementation.kept_image_tokens[0]
        alone = []
        for row in range(4):
            where = inputs["attention_mask"][row].bool()
            family.model(
                input_ids=inputs["input_ids"][row, where][None],
                pixel_values=inputs["pixel_values"][2 * row : 2 * row + 2],
            )
            alone += session.implementation.kept_image_tokens[0]
    assert together == alone
    if text in ("prumerge:max=0.7", "prumerge+:max=0.9"):
        assert len(set(together)) > 1, "no sample differs: nothing was shown"


@torch.no_grad()
def test_counts_stay_those_of_the_prompt_while_tokens_are_decoded():
    family, graph, session = prepared()
    inputs = family.inputs(2, 5)
    # A plan of its own: what others have run has counts of theirs.
    with session.under(planned(graph, "prumerge+:max=0.8", 1.0, 1, 11, 2)):
        assert session.implementation.kept_image_tokens == {}
        family.model(**inputs)
        counts = session.implementation.kept_image_tokens[0]
        family.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert session.implementation.kept_image_tokens[0] == counts
    assert session.implementation.kept_image_tokens == {}


def test_a_sample_of_several_pictures_keeps_so_many_of_each():
    (stage,) = stages_of("visionzip:dominant=4,contextual=2", 48, 16)
    assert (stage.keep, stage.of) == (18, 48)
    (stage,) = stages_of("prumerge+:max=0.25", 1152, 576)
    assert stage.keep == 288
    # A line end is no patch, so no selector drops it.
    (stage,) = stages_of("hired:ratio=0.25", 16 * 3 + 5, 16)
    assert stage.keep == 4 * 4 + 5
    (stage,) = stages_of("fastv:r=0.5", 48, 16)
    assert stage.keep == 24


@pytest.mark.parametrize("text", ["prumerge", "prumerge+", "trim", "prumerge:neighbours=3"])
def test_an_adaptive_selector_without_a_cap_has_no_price(text):
    with pytest.raises(InputError, match=r"give it a cap, such as [a-z+]*:max=0.25"):
        stages_of(text, 16, 16)


def test_more_tokens_than_an_image_has_are_refused():
    family, graph, session = prepared()
    stage = stages_of("visionzip:dominant=16,contextual=4", 16, 16)
    assert stage[0].keep == 16
    with (
        session.under(plan_of(graph, tokens=stage)),
        pytest.raises(InputError, match="makes 17 tokens of an image's 16"),
    ):
        family.model(**family.inputs())


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize(
    "text",
    [
        "prumerge:max=0.3",
        "visionzip:dominant=2,contextual=1",
        "fastervlm:keep=1",
        "hired:ratio=0.5",
    ],
)
@torch.no_grad()
def test_tiles_keep_what_was_promised_or_say_that_nothing_can_be(lowered_family, name, text):
    """Five runs of four patches, and four ends of lines; cut to the picture's shape there are 4."""
    family, graph = lowered_family(name)
    assert tiles(graph) == (5, 4)
    if name == "llava_onevision" and text.startswith(("prumerge", "hired")):
        return
    inputs = family.inputs()
    words = inputs["input_ids"].shape[1] - 24
    plan = plan_graph(graph, Request(name, 1.0, tokens=text, image_tokens=24, text_tokens=words))
    (stage,) = plan.plan.tokens
    with session_on(family.model, graph).under(plan.plan):
        family.model(**inputs)
        kept = session_on(family.model, graph).implementation.kept_image_tokens
    assert kept == {0: [stage.keep]}
    with pytest.raises(InputError, match="cut to its shape"):
        plan_graph(graph, Request(name, 1.0, tokens=text, image_tokens=4, text_tokens=words))


@torch.no_grad()
def test_ranking_by_the_attention_of_all_patches_is_priced(lowered_family):
    """A tower without a CLS token; the counter sees every product of the model and the rule."""
    family, graph = lowered_family("phi")
    inputs, of = family.inputs(), family.image_tokens
    words = inputs["input_ids"].shape[1] - of
    request = Request("phi", 1.0, image_tokens=of, text_tokens=words, new_tokens=0)
    plan = plan_graph(graph, replace(request, tokens="vispruner:keep=5")).plan
    before = family.model.config._attn_implementation
    family.model.set_attn_implementation("eager")
    with session_on(family.model, graph).under(plan), FlopCounterMode(display=False) as counter:
        family.model(**inputs, logits_to_keep=1)
    family.model.set_attn_implementation(before)
    assert counter.get_total_flops() <= plan.cost["flops"]["plan"]
    scores, *_ = parse("vispruner:keep=5").products(0, Sizes(of, tower=32, tower_queries=of))
    assert scores == (of, of, 32)
