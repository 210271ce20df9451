"""One budget for tokens, heads and layers: kept to, used up, and run by really skipping."""

import functools
from dataclasses import replace

import pytest
import torch
from grouped import with_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.models.scheduling import (
    Scheduled,
    Scheduler,
    UnifiedSwitches,
    layout_of,
    load_scheduler,
    save_scheduler,
)
from planner.models.scheduling.token_choice import best_tokens
from planner.models.scheduling.vision_controller import TokenScores, VisionSide, spread_order
from planner.models.tokens.selectors import DecoderInputs
from planner.plan import Plan, TokenStage
from planner.planning.budgets import Budget
from planner.planning.catalog import find_model
from planner.planning.graph_cache import lowered_graph
from planner.planning.plan_costs import PlanCosts

ALL = "tokens,layers,heads,mlp:groups=16"


@functools.cache
def graph_of(name="tiny-llava"):
    return lowered_graph(find_model(name, False))[0]


@functools.cache
def posed(switches, metric="flops", text=16):
    load = Workload.default(graph_of(), 49, text, 7)
    return layout_of(switches, graph_of()).under(load, (), metric)


def decided(layout, limits, seed):
    """Rows of decisions, of random scores and logits."""
    torch.manual_seed(seed)
    batch = len(limits)
    image = torch.zeros(batch, 65, dtype=torch.bool)
    image[:, 2:51] = True
    scores = TokenScores(torch.randn(batch, layout.choices), torch.randn(batch, 65), image, image)
    inputs = DecoderInputs(image, torch.ones_like(image), hidden_states=torch.randn(batch, 65, 8))
    chosen = best_tokens(layout, scores, limits, inputs)
    left = layout.left(limits, chosen.options)
    taken = layout.decide(torch.randn(batch, layout.size), left, chosen.options)
    return layout.decision(taken, chosen.options), (chosen.keep & image).sum(1)


@settings(max_examples=15, deadline=None)
@given(
    budget=st.floats(0.3, 1), seed=st.integers(0, 99), metric=st.sampled_from(["flops", "latency"])
)
def test_no_plan_passes_its_budget_and_99_per_cent_are_used(budget, seed, metric):
    layout = posed(ALL, metric)
    limit = layout.limit(Budget.of(f"{metric}={budget}"))
    rows, kept = decided(layout, torch.tensor([limit, limit]), seed)
    assert rows[:, 0].tolist() == kept.tolist()
    for row in rows:
        spent = layout.spent(row)
        assert spent <= limit
        assert layout.utilisation([spent], limit) >= (0.985 if metric == "flops" else 0.9)
        if metric == "flops":
            # Priced again, from the narrowed operators.
            costs = PlanCosts(layout.graph, layout.load, "llm")
            fraction = layout.flops_fraction(row, Plan.of(layout.graph), costs)
            assert fraction <= budget
            base = costs.of(Plan.of(layout.graph))["flops"]["base"]
            assert fraction == pytest.approx((layout.always + spent) / base, abs=1e-6)


def test_kv_bytes_are_a_budget_too():
    layout = posed(ALL, "kv")
    limit = layout.limit(Budget.of("kv=0.5"))
    rows, _ = decided(layout, torch.full((6,), limit), 0)
    assert all(layout.spent(row) <= limit for row in rows)
    assert len(rows[:, 0].unique()) > 1


def test_the_controller_costs_less_than_one_per_cent_of_a_7b_prefill():
    """The latency token's pass and all products of the networks, as they are counted."""
    graph = graph_of("llava-7b")
    layout = layout_of("tokens,layers,heads,mlp", graph)
    everything = len(layout.counts) - 1
    own = int(layout.floors[everything] + layout.room[everything])
    base = PlanCosts(graph, layout.load, "llm").of(Plan.of(graph))["flops"]["base"]
    assert 0 < own / base - 1 < 0.01
    net = Scheduler(layout, 4096).vision
    counted = {(rows, columns, inner) for rows, columns, inner in layout.overhead(576)}
    assert (640, net.features.out_features, net.features.in_features) in counted
    assert (1, layout.size, 4096) in counted


@pytest.mark.parametrize(
    ("switches", "frozen"),
    [
        ("tokens", {"layers", "heads", "mlp"}),
        ("tokens,layers", {"heads", "mlp"}),
        ("tokens,mlp", {"layers", "heads"}),
    ],
)
def test_an_axis_that_is_not_named_stays_on(switches, frozen):
    layout = posed(switches)
    limit = layout.limit(Budget.of(0.6))
    rows, _ = decided(layout, torch.full((3,), limit), 1)
    for row in rows:
        plan = layout.plan(row, Plan.of(layout.graph))
        for axis, own in (("layers", plan.layers_off), ("heads", plan.heads), ("mlp", plan.mlp)):
            assert not own or axis not in frozen
        assert plan.tokens[0].keep == row[0] < 49
        assert layout.spent(row) <= limit


def test_counts_are_open_that_use_a_budget_up():
    """Eight layers are coarse steps: tokens have to make up for that, where they can."""
    layout = posed("tokens,layers")
    limits = torch.tensor([layout.limit(Budget.of(b)) for b in (0.4, 0.62, 0.9, 1.0)])
    rows, _ = decided(layout, limits, 2)
    used = [layout.utilisation([layout.spent(r)], int(n)) for r, n in zip(rows, limits)]
    assert min(used) > 0.96
    opened = posed(ALL).open_counts(torch.tensor([0, 10**18]))
    assert opened[0].nonzero().flatten().tolist() == [0]
    assert opened[1].nonzero().flatten().tolist()[-1] == layout.choices - 1


def test_a_rule_can_stand_in_for_the_vision_side():
    rows, kept = decided(posed("tokens,layers:scorer=uniform"), torch.tensor([10**7]), 3)
    assert rows[0, 0] == kept[0]
    with pytest.raises(InputError, match="choose from learned, spread, uniform"):
        layout_of("tokens:scorer=best", graph_of())


# -- running ---------------------------------------------------------------------------------------


def scheduler_of(graph, switches):
    torch.manual_seed(1)
    scheduler = Scheduler.of(graph, switches)
    for parameter in scheduler.parameters():
        parameter.data.normal_(std=0.5)
    return scheduler.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("gemma3", "tokens,layers,heads,mlp"),
        *(
            ("llava", switches)
            for switches in ("tokens,layers,heads,mlp", "tokens", "tokens,heads")
        ),
    ],
)
def test_skipping_answers_as_masking_does(name, switches):
    """Every sample of a batch under its own budget, with tokens, layers and heads of its own."""
    family, graph = with_groups(name)
    scheduler = scheduler_of(graph, switches)
    inputs = family.inputs(batch=3, before=(3, 1), after=(5, 2, 4))
    real = inputs["attention_mask"] == 1
    load = Workload.default(graph, family.image_tokens, 8, 0)
    answers = []
    for mask in (False, True):
        scheduled = Scheduled(family.model, graph, scheduler, mask=mask)
        with scheduled.using([0.5, 0.7, 0.9], workload=load):
            # Dropped tokens have no output of their own.
            logits = family.model(**inputs).logits[real]
            kept = scheduled.kept_image_tokens
            keep = scheduled.chosen.keep[real].bool()
            tokens = family.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        rows = scheduled.decisions[0]
        answers.append((logits[keep], tokens, rows))
        if not mask:
            assert kept == {0: rows[:, 0].tolist()}
        layout = scheduled.layout
        for row, limit in zip(rows, scheduled.limits, strict=True):
            assert layout.spent(row) <= limit
    assert torch.equal(answers[0][2], answers[1][2])
    assert len(answers[0][2].unique(dim=0)) == 3
    assert (answers[0][0] - answers[1][0]).norm() <= 1e-5 * answers[1][0].norm()
    assert torch.equal(answers[0][1], answers[1][1])


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch():
    family, graph = with_groups("llava")
    scheduler = scheduler_of(graph, "tokens,layers,heads,mlp")
    inputs = family.inputs(batch=2, after=(5, 5))
    load = Workload.default(graph, family.image_tokens, 8, 0)
    with Scheduled(family.model, graph, scheduler).using(0.6, workload=load):
        together = family.model(**inputs).logits
        alone = family.model(
            **{name: value[1:] for name, value in inputs.items() if value is not None}
        ).logits
    assert torch.allclose(together[1:], alone, atol=1e-4)


@torch.no_grad()
def test_a_prompt_without_images_keeps_to_its_budget():
    family, graph = with_groups("llava")
    scheduler = scheduler_of(graph, "tokens,layers,heads,mlp")
    ids = torch.randint(3, 100, (2, 9))
    scheduled = Scheduled(family.model, graph, scheduler)
    with scheduled.using(0.8, workload=Workload.default(graph, 0, 9, 0)):
        family.model(input_ids=ids)
    for plan in scheduled.plans():
        assert not plan.tokens
        load = Workload.default(graph, 0, 9, 0)
        assert PlanCosts(graph, load, "llm").of(plan)["flops"]["fraction"] <= 0.8


def test_the_choice_follows_content_words_and_budget():
    vision = scheduler_of(graph_of(), ALL).vision
    torch.manual_seed(0)
    embeds = torch.randn(1, 12, vision.features.in_features)
    image = torch.zeros(1, 12, dtype=torch.bool)
    image[:, 1:9] = True
    share = torch.tensor([0.5])
    plain = vision(embeds, image, ~image, share)
    other = embeds.clone()
    other[:, 10] += 1
    assert not torch.equal(vision(other, image, ~image, share).tokens[image], plain.tokens[image])
    assert not torch.equal(vision(embeds, image, ~image, share / 2).counts, plain.counts)
    # What stands behind the prompt is not seen.
    words = ~image
    words[:, 11] = False
    hidden = embeds.clone()
    hidden[:, 11] += 1
    one, two = (vision(given, image, words, share) for given in (embeds, hidden))
    assert torch.equal(one.tokens[:, :11], two.tokens[:, :11])
    assert torch.equal(one.counts, two.counts)


@pytest.mark.parametrize("tokens", [1, 2, 37, 49, 576])
def test_the_first_tokens_of_a_spread_are_never_far_apart(tokens):
    """Of any few, and of all images together; text has no part in it."""
    image = torch.zeros(2, 5 + tokens, dtype=torch.bool)
    image[0, 5:], image[1, :tokens] = True, True
    places = [row[mask].argsort() for row, mask in zip(spread_order(image), image)]
    assert torch.equal(*places)
    assert len(spread_order(image)[0][image[0]].unique()) == tokens
    for first in range(1, tokens + 1):
        kept = places[0][:first].sort().values
        ends = torch.cat([torch.tensor([-1]), kept, torch.tensor([tokens])])
        # Halving intervals leaves none more than four times as wide as they would be on average.
        assert int(ends.diff().max()) <= 4 * (tokens + 1) / (first + 1) + 1


@torch.no_grad()
def test_a_vision_side_begins_with_the_spread_and_can_leave_it():
    torch.manual_seed(0)
    vision = VisionSide(32, 9, spread=True)
    image = torch.zeros(1, 20, dtype=torch.bool)
    image[:, 2:18] = True
    given = torch.randn(1, 20, 32), image, ~image, torch.tensor([0.5])

    def first() -> set[int]:
        return set(vision(*given).tokens[image].topk(4).indices.tolist())

    assert first() == {0, 4, 8, 12}
    vision.match.fill_(30)
    assert first() != {0, 4, 8, 12}


# -- names, files and what is refused --------------------------------------------------------------


@pytest.mark.parametrize(
    "switches", [ALL, "tokens", "tokens,mlp:groups=4,scorer=divprune", "tokens,heads:scorer=spread"]
)
def test_a_controller_comes_back_from_its_folder(tmp_path, switches):
    scheduler = scheduler_of(graph_of(), switches)
    save_scheduler(scheduler, tmp_path)
    again = load_scheduler(tmp_path, graph_of())
    assert isinstance(again.layout, UnifiedSwitches)
    assert again.layout == scheduler.layout
    assert again.layout.name == switches
    for name, tensor in scheduler.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_budgets_and_stages_that_cannot_be_are_refused():
    layout = posed(ALL)
    with pytest.raises(InputError, match=r"less than the layers that always run and the contr"):
        layout.limit(Budget.of(0.1))
    with pytest.raises(InputError, match="one limit of flops"):
        layout.limit(Budget.of("kv=0.7"))
    with pytest.raises(InputError, match="cannot keep to memory"):
        layout.under(metric="memory")
    with pytest.raises(InputError, match="chooses image tokens itself"):
        layout.under(stages=(TokenStage(2, 20, 49),))
    blind = replace(graph_of(), properties={**graph_of().properties, "image_tokens": 0})
    with pytest.raises(InputError, match="has no image tokens"):
        layout_of("tokens,layers", blind)
    family, graph = with_groups("llava")
    with Scheduled(family.model, graph, scheduler_of(graph, "tokens")).using(0.95):
        embeds = torch.zeros(1, 4, 64)
        with pytest.raises(InputError, match="call the whole model"):
            family.model(inputs_embeds=embeds)


@torch.no_grad()
def test_all_tokens_can_stay_with_the_controller_s_cost_counted():
    layout = posed("tokens,heads,mlp:scorer=all")
    limit = layout.limit(Budget.of(0.7))
    taken = layout.decide(torch.randn(1, layout.size), torch.tensor([limit]))
    row = layout.decision(taken)[0]
    assert row[0] == 49
    assert layout.spent(row) <= limit
    costs = PlanCosts(layout.graph, layout.load, "llm")
    plan = layout.plan(row, Plan.of(layout.graph))
    assert costs.of(plan)["flops"]["fraction"] < layout.flops_fraction(row, plan, costs) <= 0.7
    family, graph = with_groups("llava")
    scheduler = scheduler_of(graph, "tokens,heads,mlp:scorer=all")
    assert scheduler.vision is None
    with Scheduled(family.model, graph, scheduler).using(0.8) as _:
        family.model(**family.inputs(batch=2))
