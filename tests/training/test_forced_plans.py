"""Plans that take a controller's place on its weights, and what its token draws learn by."""

from dataclasses import replace

import pytest
import torch

from planner.ir.cost import Workload
from planner.models.scheduling import Scheduled, Scheduler, layout_of
from planner.models.scheduling.vision_controller import TokenScores
from planner.models.tokens.selectors import DecoderInputs
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.plan_costs import PlanCosts
from planner.training.data import SceneQuestions, Turn
from planner.training.estimators import parse
from planner.training.evaluate import MAX_NEW_TOKENS, predict, score
from planner.training.experiments import (
    forced_plans,
)
from planner.training.experiments.controllers import (
    FAMILIES,
)
from planner.training.experiments.forced_plans import (
    Forced,
    begin_with,
    best_of_tried,
    best_static,
    packed,
    random_plan,
)
from planner.training.token_draws import draw_tokens

SWITCHES = "tokens,layers,heads,mlp"


@pytest.fixture
def forced(base):
    model, _, graph = base
    torch.manual_seed(0)
    scheduler = Scheduler.of(graph, SWITCHES).eval()
    for parameter in scheduler.parameters():
        parameter.data.normal_(std=0.3)
    layout = scheduler.layout.under(Workload.default(graph, text_tokens=16, new_tokens=0))
    scheduled = Scheduled(model, graph, scheduler, mask=True)
    return Forced(scheduled, layout, Budget.of(0.7))


@pytest.fixture(scope="module")
def some(base):
    return packed(base[1], SceneQuestions("val", 6, 0, FAMILIES))


def spent_by(forced, rows):
    return [forced.layout.spent(row) for row in rows]


def test_answers_are_what_greedy_decoding_says(base, forced, some):
    """Of whole answers, whatever their length."""
    model, processor, _ = base
    questions = SceneQuestions("val", 6, 0, FAMILIES)
    with forced.scheduled.using(0.7, (), forced.layout.load):
        said = predict(model, processor, questions)
    assert forced.answers(some).right.tolist() == [
        score(question.turns[0], answer) for question, answer in zip(questions, said, strict=True)
    ]
    # As good as the model gets that would say what it says.
    told = [
        replace(q, turns=(Turn(q.turns[0].question, answer),))
        for q, answer in zip(questions, said, strict=True)
    ]
    ended = [len(a.split()) < MAX_NEW_TOKENS for a in said]
    right = forced.answers(packed(processor, told)).right
    assert right[torch.tensor(ended)].all()


def test_pictures_are_read_once_for_all_plans(base, forced, some):
    calls = []
    tower = base[0].get_encoder("image")
    hook = tower.register_forward_hook(lambda *_: calls.append(1))
    first = forced.answers(some)
    forced.budget = Budget.of(1.0)
    forced.answers(some)
    hook.remove()
    assert len(calls) == len(some)
    forced.budget, forced.pictures = Budget.of(0.7), {}
    assert torch.equal(forced.answers(some).loss, first.loss)


def test_one_static_plan_is_for_all_and_pays_for_no_controller(base, forced, some, monkeypatch):
    monkeypatch.setattr(forced_plans, "_STATIC_COUNTS", 3)
    tried = {}
    loss = Forced.loss

    def noting(self, batches):
        found = loss(self, batches)
        tried[tuple(self.answers(batches).rows[0].tolist())] = found
        return found

    monkeypatch.setattr(Forced, "loss", noting)
    row = best_static(forced, some, torch.arange(forced.layout.size).float())
    assert tried[tuple(row.tolist())] == min(tried.values())
    assert len(tried) > 3
    layout = forced.on_grid
    costs = PlanCosts(base[2], layout.load, "llm")
    shares = [
        costs.of(layout.plan(torch.tensor(each), Plan.of(base[2])))["flops"]["fraction"]
        for each in tried
    ]
    assert max(shares) <= 0.7
    # What a controller would have cost.
    limit = forced.layout.limit(forced.budget)
    assert max(spent_by(forced, torch.tensor(list(tried)))) > limit
    forced.plan_all(row)
    assert forced.answers(some).rows.unique(dim=0).tolist() == [row.tolist()]


def test_a_switch_is_worth_what_its_absence_costs(forced, some):
    worth = forced.worth(some)
    forced.budget = Budget.of(1.0)
    row = torch.ones(1 + forced.layout.size, dtype=torch.long)
    row[0] = forced.layout.counts[-1]
    forced.plan_all(row)
    whole = forced.loss(some)
    row[3] = 0
    forced.plan_all(row)
    assert worth[2] == pytest.approx(forced.loss(some) - whole, abs=1e-6)


def test_random_plans_differ_and_keep_to_the_limit(forced, some):
    random_plan(forced, 0)
    rows = forced.answers(some).rows
    assert len(rows.unique(dim=0)) == 6
    assert max(spent_by(forced, rows)) <= forced.layout.limit(forced.budget)
    forced.controller()
    own = forced.answers(some).rows
    forced.perturb(0.0, torch.Generator())
    assert torch.equal(forced.answers(some).rows, own)


def test_parts_of_a_controller_are_taken_one_by_one(forced, some):
    own = forced.answers(some).rows
    scores = torch.arange(forced.layout.size).float()
    forced.fix_switches(scores)
    fixed = forced.answers(some)
    assert torch.equal(fixed.rows[:, 0], own[:, 0])
    layout = forced.layout
    options = torch.tensor([layout.counts.index(int(row[0])) for row in own])
    left = layout.left(torch.full((6,), layout.limit(forced.budget)), options)
    expected = layout.decide(scores.expand(6, -1), left, options)
    assert torch.equal(fixed.rows[:, 1:].bool(), expected)
    assert not torch.equal(fixed.rows, own)
    forced.controller()
    forced.fix_tokens()
    for _ in forced.read(some):
        chosen, image = forced.scheduled.chosen, forced.scheduled.scores.image
    kept = {}
    for row, option in enumerate(chosen.options.tolist()):
        grid = chosen.keep[row][image[row]]
        assert grid.sum() == layout.counts[option]
        assert torch.equal(kept.setdefault(option, grid), grid)
    forced.controller()
    forced.answers(some)
    assert not torch.equal(forced.scheduled.chosen.keep, chosen.keep)
    forced.fix_tokens()
    assert torch.equal(forced.answers(some).rows[:, 0], own[:, 0])


def test_a_controller_can_begin_with_one_plan(forced, some):
    """For all questions; what it costs itself is left out of the plan."""
    static = best_static(forced, some, torch.arange(float(forced.layout.size)))
    begin_with(forced.scheduled.scheduler, static)
    (row,) = forced.answers(some).rows.unique(dim=0)
    on, wanted = row[1:].bool(), static[1:].bool()
    if row[0] == static[0]:
        assert (wanted | ~on).all()
    assert abs(forced.layout.counts.index(row[0]) - forced.layout.counts.index(static[0])) <= 1
    assert forced.layout.spent(row) <= forced.layout.limit(forced.budget)


def test_the_oracle_is_no_worse_than_what_it_tries(forced, some, monkeypatch):
    monkeypatch.setattr(forced_plans, "TRIED", 4)
    own = forced.answers(some)
    static = own.rows[0]
    forced.plan_all(static)
    fixed = forced.answers(some)
    found = best_of_tried(forced, some, static, 0)
    assert (found.loss <= torch.minimum(own.loss, fixed.loss)).all()
    assert found.loss.sum() < torch.minimum(own.loss, fixed.loss).sum()
    assert max(spent_by(forced, found.rows)) <= forced.layout.limit(forced.budget)
    assert found.right.shape == (6,)


def test_a_plan_s_price_is_what_the_cost_model_finds_anew(base, forced, some):
    costs = PlanCosts(base[2], forced.layout.load, "llm")
    whole = costs.of(Plan.of(base[2]))["flops"]["base"]
    for row in forced.answers(some).rows:
        anew = forced.layout.flops_fraction(row, forced.scheduled.base(), costs)
        priced = (forced.layout.spent(row) + forced.layout.always) / whole
        assert priced == pytest.approx(anew, rel=1e-9)


def test_a_count_s_gradient_knows_what_it_leaves_for_the_switches(base):
    layout = layout_of(SWITCHES, base[2])
    layout = layout.under(Workload.default(base[2], text_tokens=16, new_tokens=0))
    limits = torch.tensor([layout.limit(Budget.of(0.8))])
    image = torch.ones(1, 49, dtype=torch.bool)
    counts = torch.zeros(1, layout.choices, requires_grad=True)
    tokens = torch.randn(1, 49, requires_grad=True)
    scores = TokenScores(counts, tokens, image, image.float())
    inputs = DecoderInputs(image, image)
    noise = [torch.Generator().manual_seed(0)]
    drawn = draw_tokens(layout, scores, limits, inputs, parse("gumbel"), noise)
    kept = layout.counts[int(drawn.chosen.options)]
    assert drawn.chosen.keep.sum() == kept
    assert drawn.allowance.item() == 1
    (more,) = torch.autograd.grad(drawn.allowance.sum(), counts, retain_graph=True)
    opened = layout.open_counts(limits)[0].nonzero().flatten()
    # Fewer tokens leave more.
    assert more[0, opened[0]] > 0 > more[0, opened[-1]]
    assert not more[0, ~layout.open_counts(limits)[0]].any()
    by_count, by_token = torch.autograd.grad(drawn.chosen.keep.sum(), (counts, tokens))
    # And more tokens stay by larger counts.
    assert by_count[0, opened[-1]] > 0 > by_count[0, opened[0]]
    assert by_token.any()
