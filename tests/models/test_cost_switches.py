"""Budgets in cost: no plan passes one, little of it is left, skipping does what masking does."""

import functools

import pytest
import torch
from grouped import with_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.models.scheduling import (
    CostSwitches,
    Scheduled,
    Scheduler,
    layout_of,
    load_scheduler,
    save_scheduler,
)
from planner.plan import Plan, TokenStage
from planner.planning.budgets import Budget
from planner.planning.catalog import find_model
from planner.planning.graph_cache import lowered_graph
from planner.planning.plan_costs import PlanCosts
from planner.planning.selectors import stages_of
from planner.training.estimators import parse
from planner.training.sequential_draws import take_best
from planner.training.switch_costs import AdditiveCosts, SiteCosts, costs_of

SWITCHES = ("layers,heads,mlp", "layers,heads,mlp:groups=16", "heads,mlp", "layers,mlp:groups=5")


@functools.cache
def tiny_graph():
    return lowered_graph(find_model("tiny-llava", False))[0]


@pytest.fixture
def tiny_llava():
    return tiny_graph()


def base_of(graph, stages=()):
    fingerprint = str(graph.properties["fingerprint"])
    return Plan(graph.name, fingerprint, graph.layers, tokens=tuple(stages))


def leftovers(layout, taken):
    """What every switch that is off, and could be on by itself, would cost."""
    spent = layout.spent(taken)
    for switch in (~taken).nonzero().flatten().tolist():
        more = taken.clone()
        more[switch] = True
        if layout.plan(more, base_of(layout.graph)) != layout.plan(taken, base_of(layout.graph)):
            yield layout.spent(more) - spent


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_no_plan_passes_its_budget_and_nothing_more_would_fit(data):
    """Whatever the logits, prompts, metric and token stages are; priced twice, by other code."""
    tiny_llava = tiny_graph()
    image = data.draw(st.sampled_from([0, 49]))
    load = Workload.default(tiny_llava, image, data.draw(st.integers(1, 90)), 7)
    tokens = data.draw(st.sampled_from(["", "fastv:k=2,r=0.5", "prumerge+:ratio=0.25"]))
    stages = stages_of(tokens, image) if tokens and image else ()
    metric = data.draw(st.sampled_from(["flops", "kv"]))
    layout = layout_of(data.draw(st.sampled_from(SWITCHES)), tiny_llava)
    fraction = data.draw(st.floats(0.51, 1))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(2, layout.size).round(decimals=data.draw(st.sampled_from([0, 3])))
    layout = layout.under(load, stages, metric)
    try:
        limit = layout.limit(Budget.of(f"{metric}={fraction}"))
    except InputError:
        # Selecting tokens costs something, and a single cheap token may be all there is to drop.
        assert layout.always / layout.problem.limits[0] > fraction
        return
    costs = PlanCosts(tiny_llava, load, "llm")
    slack = 1e-3 if layout.groups == 5 else 0
    for taken in layout.decide(logits, torch.tensor([limit, limit])):
        spent = layout.spent(taken)
        assert spent <= limit
        assert all(more > limit - spent for more in leftovers(layout, taken))
        priced = costs.of(layout.plan(taken, base_of(tiny_llava, stages)))[metric]
        assert priced["fraction"] <= fraction
        # Where groups differ by a neuron, the wider ones are counted first.
        assert 0 <= layout.always + spent - priced["plan"] <= slack * priced["base"]
        assert priced["base"] == layout.problem.limits[0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), budget=st.floats(0.51, 1))
def test_budgets_are_used_to_99_per_cent(seed, budget):
    """With 16 groups in an MLP no switch of tiny-llava costs more than 0.0056 of it."""
    tiny_llava = tiny_graph()
    layout = layout_of("layers,heads,mlp:groups=16", tiny_llava)
    limit = layout.limit(Budget.of(budget))
    torch.manual_seed(seed)
    logits = torch.randn(3, layout.size) * 3
    limits = torch.full((3,), limit)
    noise = [torch.Generator().manual_seed(seed + row) for row in range(3)]
    drawn = parse("gumbel").draw(logits, costs_of(layout), limits, noise).taken
    for taken in (*drawn, *layout.decide(logits, limits)):
        assert 0.989 <= layout.utilisation([layout.spent(taken)], limit) <= 1


@pytest.mark.parametrize("switches", SWITCHES)
def test_training_and_inference_have_one_rule(tiny_llava, switches):
    layout = layout_of(switches, tiny_llava)
    costs = costs_of(layout)
    assert isinstance(costs, SiteCosts if "layers" in switches else AdditiveCosts)
    torch.manual_seed(0)
    logits = torch.randn(12, layout.size).round(decimals=1)
    limits = torch.randint(0, layout.steps + 1, (12,))
    limits[:2] = torch.tensor([0, layout.steps])
    taken = layout.decide(logits, limits)
    assert torch.equal(taken, take_best(logits, torch.zeros_like(taken), costs, limits))
    assert layout.spent(taken[0]) == 0
    assert taken[1].all()


def test_a_sample_s_draws_do_not_depend_on_its_batch(tiny_llava):
    layout = layout_of("layers,heads,mlp", tiny_llava)
    costs, limits = costs_of(layout), torch.tensor([layout.steps // 3, layout.steps])
    logits = torch.randn(2, layout.size)
    for name in ("gumbel", "gumbel-topk"):
        together, alone = (
            parse(name).draw(
                logits[rows],
                costs,
                limits[rows],
                [torch.Generator().manual_seed(number) for number in (5, 6)[rows]],
            )
            for rows in (slice(0, 2), slice(0, 1))
        )
        assert torch.equal(together.taken[:1], alone.taken)


def test_layers_behind_a_token_stage_cost_less(tiny_llava):
    """So a budget leaves more of them on: one budget for tokens and switches."""
    plain = layout_of("layers,heads,mlp:groups=16", tiny_llava)
    stages = stages_of("fastv:k=2,r=0.5", 49)
    dropped = plain.under(None, stages)
    assert dropped.steps < 0.85 * plain.steps
    budget = Budget.of(0.6)
    assert dropped.limit(budget) / dropped.steps > 2 * plain.limit(budget) / plain.steps
    # Beyond what everything costs there is nothing to spend it on.
    assert dropped.limit(Budget.of(1)) == dropped.steps
    assert plain.limit(Budget.of(1)) == plain.steps


def test_the_token_says_what_share_may_be_on(tiny_llava):
    layout = layout_of("layers,heads,mlp", tiny_llava)
    scheduler = Scheduler(layout, 32)
    dropped = layout.under(None, stages_of("fastv:k=2,r=0.5", 49))
    half = scheduler.token(torch.tensor([layout.steps // 2]))
    same = scheduler.token(torch.tensor([dropped.steps // 2]), dropped.steps)
    assert torch.allclose(half, same, atol=1e-5)
    levels = torch.linspace(0, layout.steps, 17).long()
    assert torch.pdist(scheduler.token(levels)).min() > 1e-3


# -- running ---------------------------------------------------------------------------------------


def scheduler_of(graph, switches):
    torch.manual_seed(1)
    scheduler = Scheduler.of(graph, switches)
    scheduler.head.weight.data.normal_()
    return scheduler.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("llava", "heads,mlp:groups=3"),
        *((name, "layers,heads,mlp") for name in ("llava", "qwen2_5_vl", "gemma3", "phi")),
    ],
)
def test_skipping_answers_as_masking_does(name, switches):
    family, graph = with_groups(name)
    scheduler = scheduler_of(graph, switches)
    inputs = family.inputs(batch=3, before=(3, 1), after=(5, 2, 4))
    real = inputs["attention_mask"] == 1
    load = Workload.default(graph, family.image_tokens, 8, 0)
    answers = []
    for mask in (False, True):
        scheduled = Scheduled(family.model, graph, scheduler, mask=mask)
        with scheduled.using([0.6, 0.8, 1.0], workload=load):
            logits = family.model(**inputs).logits[real]
            tokens = family.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answers.append((logits, tokens, scheduled.taken))
        costs = PlanCosts(graph, load, "llm")
        for plan, budget in zip(scheduled.plans(), (0.6, 0.8, 1.0), strict=True):
            assert costs.of(plan)["flops"]["fraction"] <= budget
    assert torch.equal(answers[0][2], answers[1][2])
    assert len(answers[0][2].unique(dim=0)) == 3
    assert (answers[0][0] - answers[1][0]).norm() <= 1e-5 * answers[1][0].norm()
    assert torch.equal(answers[0][1], answers[1][1])


@torch.no_grad()
def test_tokens_and_switches_share_a_budget_at_run_time():
    family, graph = with_groups("llava")
    scheduler = scheduler_of(graph, "layers,heads,mlp")
    inputs = family.inputs(batch=2, after=(5, 3))
    load = Workload.default(graph, family.image_tokens, 8, 0)
    on = {}
    for tokens in ("", "fastv:k=2,r=0.5"):
        stages = stages_of(tokens, family.image_tokens) if tokens else ()
        answers = []
        for mask in (False, True):
            scheduled = Scheduled(family.model, graph, scheduler, mask=mask)
            with scheduled.using(0.65, stages, load):
                answers.append(family.model(**inputs).logits[inputs["attention_mask"] == 1])
        assert (answers[0] - answers[1]).norm() <= 1e-5 * answers[1].norm()
        plans = scheduled.plans()
        costs = PlanCosts(graph, load, "llm")
        assert all(costs.of(plan)["flops"]["fraction"] <= 0.65 for plan in plans)
        on[tokens] = int(scheduled.taken.sum())
    assert on["fastv:k=2,r=0.5"] > on[""]


def test_a_layer_that_is_off_can_come_back():
    """In training its switches have a gradient, which a closed gate would hide."""
    _, graph = with_groups("llava")
    layout = layout_of("layers,heads,mlp", graph)
    taken = torch.zeros(1, layout.size, requires_grad=True)
    gates = layout.gates(taken)
    assert all((gate == 1).all() for gate in gates.layers.values())
    assert set(gates.heads) == set(gates.mlp) == {2, 3}
    with torch.no_grad():
        closed = layout.gates(torch.zeros(1, layout.size))
    assert all((gate == 0).all() for gate in closed.layers.values())
    plan = layout.plan(torch.zeros(layout.size, dtype=torch.bool), base_of(graph))
    assert plan.layers_off == (2, 3)


# -- names, files and what is refused --------------------------------------------------------------


def test_a_scheduler_comes_back_from_its_folder(tiny_llava, tmp_path):
    scheduler = Scheduler.of(tiny_llava, "mlp,layers:groups=16")
    save_scheduler(scheduler, tmp_path)
    again = load_scheduler(tmp_path, tiny_llava).layout
    assert again == scheduler.layout
    assert (again.name, again.size) == ("layers,mlp:groups=16", 4 * 17)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ("layers,heads:group=4", "end in :groups=16"),
        ("mlp:groups=0", "end in :groups=16"),
        ("all", "cannot have the switches 'all'"),
        ("layer", "unknown switches"),
        ("mlp:groups=9999", "too few for 9999 groups"),
    ],
)
def test_bad_names_are_one_sentence(tiny_llava, switches, message):
    with pytest.raises(InputError, match=message):
        layout_of(switches, tiny_llava)


def test_budgets_that_cannot_be_kept_to_are_refused(tiny_llava):
    layout = layout_of("layers,heads,mlp", tiny_llava)
    assert isinstance(layout, CostSwitches)
    with pytest.raises(InputError, match=r"the layers that always run take, 0\.5001"):
        layout.limit(Budget.of(0.5))
    with pytest.raises(InputError, match="one limit of flops"):
        layout.limit(Budget.of("kv=0.7"))
    with pytest.raises(InputError, match="one limit of flops"):
        layout.limit(Budget.of(["0.7", "kv=0.7"]))
    with pytest.raises(InputError, match="cannot keep to memory"):
        layout.under(metric="memory")
    with pytest.raises(InputError, match="behind the first switch"):
        layout.under(stages=(TokenStage(5, 20, 49),))
    amount = layout.limit(Budget.of(f"flops={0.7 * layout.problem.limits[0]}"))
    assert amount == pytest.approx(layout.limit(Budget.of(0.7)), abs=1)
