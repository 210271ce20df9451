"""The comparison of controllers: what stands in for them, what is resampled, how a page says it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_llava import write_small_llava

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.loading import load_model
from planner.models.scheduling import Scheduled, Scheduler, layout_of
from planner.models.scheduling.vision_controller import TokenScores
from planner.models.tokens.selectors import DecoderInputs
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.catalog import find_model
from planner.planning.graph_cache import lowered_graph
from planner.planning.plan_costs import PlanCosts
from planner.training import evaluate
from planner.training.data import SceneQuestions, Turn
from planner.training.estimators import parse
from planner.training.evaluate import MAX_NEW_TOKENS, predict, score
from planner.training.experiments import (
    comparison_page,
    controllers,
    forced_plans,
    plan_pictures,
    write_results,
)
from planner.training.experiments.comparison_page import (
    check_comparison,
    comparison_markdown,
    run_comparison,
)
from planner.training.experiments.comparisons import COMPARISONS
from planner.training.experiments.controllers import (
    FAMILIES,
    Measuring,
    compared,
    static_beside,
    steps_to_stable,
)
from planner.training.experiments.forced_plans import (
    Forced,
    begin_with,
    best_of_tried,
    best_static,
    packed,
    random_plan,
)
from planner.training.experiments.kept_results import Loaded, Runs
from planner.training.experiments.published_cells import Published, as_measured, as_published
from planner.training.recipes import load_recipe
from planner.training.token_draws import draw_tokens

SWITCHES = "tokens,layers,heads,mlp"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_small_llava(tmp_path_factory.mktemp("base"))
    model, processor, _ = load_model(str(folder))
    return model, processor, lower_model(model, "small")


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


# -- plans -----------------------------------------------------------------------------------------


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


# -- gradients of token draws ----------------------------------------------------------------------


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


# -- statistics ------------------------------------------------------------------------------------


def cell(variant, seed, right, budget=0.5):
    return {
        "variant": variant,
        "budget": budget,
        "seed": seed,
        "accuracy": float(np.mean([int(d) for d in right])),
        "families": {"count": 0.5},
        "cost_fraction": budget,
        "utilisation": 0.99,
        "violations": 0,
        "plans": 3,
        "right": right,
    }


def test_pairs_take_out_what_questions_share():
    """Questions differ much, variants little: only pairing sees it."""
    rng = np.random.default_rng(0)
    first = rng.random(400) < 0.5
    second = first | (rng.random(400) < 0.05)
    rows = []
    for seed in (0, 1):
        rows.append(cell("a", seed, "".join(str(int(x)) for x in second)))
        rows.append(cell("b", seed, "".join(str(int(x)) for x in first)))
    (found,) = compared(rows, "b", resamples=300)
    assert (found["variant"], found["against"]) == ("a", "b")
    assert found["difference"] == pytest.approx(second.mean() - first.mean())
    assert 0 < found["standard_error"] < 0.015 < 0.035
    assert found["low"] > 0
    assert found["low"] < found["difference"] < found["high"]
    (back,) = compared(rows, "a", resamples=300)
    assert back["difference"] == -found["difference"]


def test_infeasible_cells_are_compared_with_nothing():
    rows = [cell("a", 0, "11"), {"variant": "b", "budget": 0.5, "seed": 0, "infeasible": "why"}]
    assert list(compared(rows, "a")) == list(compared(rows, "b")) == []


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([5, 4, 1, 1, 1, 1], 30),
        ([5, 1, 1, 4, 1, 1, 1], 50),
        ([1, 2, 3], None),
        ([1], None),
    ],
)
def test_a_curve_is_stable_where_it_stays_near_its_end(losses, steps):
    assert steps_to_stable([(10 * (n + 1), float(x)) for n, x in enumerate(losses)]) == steps


# -- cells and pages -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPARISONS)
def test_variants_have_files_and_configurations_of_their_own(name, tmp_path):
    comparison = COMPARISONS[name]
    assert len({(v.name, v.plans) for v in comparison.variants}) == len(comparison.variants)
    assert set(comparison.against) <= {v.name for v in comparison.variants}
    for variant in comparison.variants:
        settings = [f"output_dir={tmp_path}", *variant.settings]
        assert load_recipe(controllers.CONFIG, settings)[1].recipe == "unified"


def test_a_comparison_tells_how_it_stands(base, tmp_path, monkeypatch):
    """Variant by variant, and again only what is new; at last with what was decided."""
    folder = write_small_llava(tmp_path / "base")
    comparison = COMPARISONS["exp2"]
    some = tuple(v for v in comparison.variants if v.name in ("all", "random", "static"))
    monkeypatch.setitem(
        COMPARISONS, "exp2", replace(comparison, variants=some, budgets=(0.9, 0.05))
    )
    settings = [f"model={folder}", "max_steps=1", "batch_size=2", "least_budget=0.5"]
    call = Runs("exp2", tmp_path / "work", (0,), 10, settings, print)
    stands = list(run_comparison(call))
    assert [len(found["rows"]) for found in stands] == [1, 2, 3, 3]
    assert [row["variant"] for row in stands[-1]["rows"]] == ["all", "static", "random"]
    assert {row["variant"] for row in stands[-1]["infeasible"]} == {"all", "static", "random"}
    (again,) = run_comparison(call)
    assert again == stands[-1]
    write_results(json.loads(json.dumps(again)), tmp_path)
    text = (tmp_path / "exp2.md").read_text()
    gain = 100 * (again["rows"][0]["accuracy"] - again["rows"][1]["accuracy"])
    assert f"| static | 90% | {gain:+.1f} |" in text
    assert "![plans of a question of each family](exp2-plans.svg)" in text
    assert (tmp_path / "exp2-plans.svg").read_text().count("<image") >= 15
    facts = again["plans"]
    assert [row["family"] for row in facts["families"]] == list(FAMILIES)
    for example in facts["examples"]:
        assert len(example["kept"]) == example["decision"][0]
        assert sum(example["attention"]) < 1
        # What was dropped is not attended to.
        off = set(range(49)) - set(example["kept"])
        assert not any(example["attention"][token] for token in off)


def measured_as(accuracies, asked):
    """What stands for measuring: accuracies by (variant, seed); `asked` collects what was."""

    def measure(self, comparison, variant, budget):
        asked.append((variant.name, budget, self.seed))
        right = (np.random.default_rng(len(asked)).random(20) < accuracies[variant.name]) * 1
        of_plan = {"plan": [7, 0, 1, 1]} if variant.plans == "static" else {}
        used = {"cost_fraction": budget, "utilisation": 1.0, "violations": 0, "plans": 3}
        return {**controllers._summary(right), "loss": 0.5, **used, **of_plan}

    return measure


def test_a_page_is_gone_on_from_where_nothing_else_is_left(tmp_path, monkeypatch):
    """Another machine has the page alone: no cell of it is measured again, and nothing is lost."""
    comparison = COMPARISONS["exp2"]
    some = tuple(v for v in comparison.variants if v.name in ("all", "static", "random"))
    monkeypatch.setitem(COMPARISONS, "exp2", replace(comparison, variants=some, budgets=(0.5, 0.2)))
    asked = []
    right = {"all": 0.9, "static": 0.6, "random": 0.3}
    monkeypatch.setattr(Measuring, "_controlled", measured_as(right, asked))
    here, page = Runs("exp2", tmp_path / "one", (0,), 20, (), print), tmp_path / "page"
    page.mkdir()

    def run(call):
        asked.clear()
        before = Published.at(call.page and call.page / "exp2.json").rows
        *partial, found = run_comparison(call)
        for each in partial:
            # A run that is stopped here leaves what there was.
            assert before.keys() <= {(row["seed"], row["cell"]) for row in each["rows"]}
        write_results(json.loads(json.dumps(found)), page)
        return found

    monkeypatch.setattr(comparison_page, "plan_facts", lambda bench, comparison: {})
    part = run(replace(here, variants=("all",), budgets=(0.5,)))
    assert asked == [("all", 0.5, 0)]
    assert [(row["variant"], row["budget"]) for row in part["rows"]] == [("all", 0.5)]
    whole = run(replace(here, work=tmp_path / "two", page=page))
    assert ("all", 0.5, 0) not in asked
    assert len(asked) == 5
    assert whole["rows"][0] == part["rows"][0]
    again = run(replace(here, work=tmp_path / "three", page=page))
    assert not asked
    assert again == whole
    # A second seed joins the first, of which there is the page alone.
    both = run(replace(here, work=tmp_path / "four", page=page, seeds=(1,), variants=("static",)))
    assert asked == [("static", 0.5, 1), ("static", 0.2, 1)]
    assert both["seeds"] == [0, 1]
    assert len(both["rows"]) == 8
    # Of other questions the page would keep nothing: it is not written over.
    check_comparison(replace(here, page=page))
    for other in ({"samples": 21}, {"overrides": ("max_steps=1",)}):
        with pytest.raises(InputError, match="8 cells of other questions"):
            check_comparison(replace(here, page=page, **other))
    old = json.loads((page / "exp2.json").read_text())
    del old["rows"][0]["cell"]
    (page / "exp2.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match="1 cells"):
        check_comparison(replace(here, page=page))


def test_rows_of_older_pages_are_shown_and_measured_where_more_is_needed(tmp_path, monkeypatch):
    comparison = COMPARISONS["exp2"]
    asked = []
    monkeypatch.setattr(Measuring, "_controlled", measured_as({"static": 1.0}, asked))
    variant = next(v for v in comparison.variants if v.name == "static")
    bench = Measuring(tmp_path, 3, 20, (), print)
    row = {"variant": "static", "budget": 0.5, "seed": 3, "accuracy": 0.25}
    known = Published({(3, bench.digest(variant, 0.5)): row})
    bench = replace(bench, published=known)
    assert bench.known(variant, 0.5) == row
    assert bench.cell(comparison, variant, 0.5)["plan"] == [7, 0, 1, 1]
    assert asked == [("static", 0.5, 3)]


def test_a_base_model_of_other_weights_in_the_same_folder_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(Measuring, "_controlled", measured_as({"all": 1.0}, []))
    folder, comparison = write_small_llava(tmp_path / "base"), COMPARISONS["exp2"]
    settings = (f"model={folder}", "max_steps=1")

    def bench():
        return Measuring(tmp_path / "work", 0, 20, settings, print)

    (variant,) = (v for v in comparison.variants if v.name == "all")
    row = bench().cell(comparison, variant, 0.5)
    assert bench().known(variant, 0.5) == row
    before = bench()._label(variant)
    (weights,) = folder.glob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert bench().known(variant, 0.5) is None
    assert bench()._label(variant) != before
    assert bench().changes[1] == "max_steps=1"


@given(st.text("01", max_size=70), st.integers(0, 49))
def test_a_published_row_is_what_was_measured(digits, count):
    row = {"variant": "static", "right": digits, "plan": [count, *map(int, digits)]}
    written = json.loads(json.dumps(as_published(row, "of")))
    assert as_measured(written) == row
    assert written["cell"] == "of"


@pytest.mark.parametrize("broken", ["{}", '{"rows": 3, "infeasible": []}', '{"rows": [1]}', "[]"])
def test_a_broken_page_is_told(tmp_path, broken):
    (tmp_path / "exp2.json").write_text(broken)
    call = Runs("exp2", tmp_path / "work", (0,), 5, (), print, page=tmp_path)
    with pytest.raises(InputError, match=r"exp2\.json"):
        next(run_comparison(call))


@pytest.mark.parametrize("name", ["all, tuned", "all, tuned without noise"])
def test_a_tuned_controller_is_trained_at_its_budget_alone(tmp_path, name):
    folder = write_small_llava(tmp_path / "base")
    comparison = COMPARISONS["exp2"]
    (variant,) = (v for v in comparison.variants if v.name == name)
    settings = (f"model={folder}", "max_steps=2", "batch_size=2", "least_budget=0.5")
    bench = Measuring(tmp_path / "work", 0, 5, settings, print)
    cell = bench.cell(comparison, variant, 0.8)
    assert cell["violations"] == 0
    assert cell["cost_fraction"] <= 0.8
    recipes = []
    for trained in (tmp_path / "work" / "models").iterdir():
        known = json.loads((trained / "model" / "scheduler.json").read_text())
        recipes.append(known["provenance"]["recipe"])
    *first, last = sorted(recipes, key=lambda recipe: recipe["most_budget"], reverse=True)
    assert last["least_budget"] == last["most_budget"] == 0.8
    assert last["method"].endswith("noise=0") == ("noise" in name)
    assert (last["start"] is not None) == bool(first) == bool(variant.start)


def test_a_static_plan_is_chosen_on_the_weights_that_it_is_held_against():
    comparison = COMPARISONS["exp2"]
    variants = {variant.name: variant for variant in comparison.variants}
    for name, chosen in (
        ("oracle", "static"),
        ("static, tuned", "static"),
        ("static, tuned from all", "static"),
        ("static, tuned from 900 steps", "static, 900 steps"),
        ("all, tuned from static", "static"),
    ):
        assert static_beside(comparison, variants[name]).name == chosen


def test_how_plans_differ_is_counted_over_pairs():
    names = ("layer.2", "heads.2[0]", "mlp.2[0]", "mlp.2[1]")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 2, (20, 5), generator=generator)
    found = plan_pictures._by_family(rows, names)
    first, others = rows[0::5, 1:], rows[[i for i in range(20) if i % 5], 1:]
    within = torch.stack([(a != b).double().mean() for a in first for b in first]).mean()
    between = torch.stack([(a != b).double().mean() for a in first for b in others]).mean()
    assert found[0]["within"] == pytest.approx(float(within))
    assert found[0]["between"] == pytest.approx(float(between))
    assert found[0]["mlp"] == pytest.approx(float(first[:, 2:].double().mean()))


def test_cells_are_measured_once(tmp_path, monkeypatch):
    measured = []

    def measure(self, comparison, variant, budget):
        measured.append(variant.name)
        return {"accuracy": 0.5, "right": "10"}

    monkeypatch.setattr(Measuring, "_controlled", measure)
    comparison = COMPARISONS["exp2"]
    variant = comparison.variants[0]
    for samples, overrides in ((2, ()), (2, ()), (3, ()), (3, ("max_steps=2",))):
        bench = Measuring(tmp_path, 0, samples, overrides, print)
        found = bench.cell(comparison, variant, 0.5)
        assert found["variant"] == "all"
    assert len(measured) == 3


def test_selectors_keep_to_the_budget(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Measuring, "load", lambda self, name: Loaded(*base))
    monkeypatch.setattr(evaluate, "_generate", lambda model, processor, asked: ["?"] * len(asked))
    bench = Measuring(tmp_path, 0, 5, (), print)
    comparison = COMPARISONS["exp1"]
    for variant in comparison.variants:
        if variant.selector is not None and variant.name not in ("prumerge", "prumerge+"):
            found = bench.cell(comparison, variant, 0.75)
            assert 0.5 < found["cost_fraction"] <= 0.75, variant.name
    assert "cannot keep to 0.1" in bench.cell(comparison, comparison.variants[5], 0.1)["infeasible"]


def test_an_adaptive_selector_costs_what_it_keeps(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Measuring, "load", lambda self, name: Loaded(*base))
    bench = Measuring(tmp_path, 0, 5, (), print)
    comparison = COMPARISONS["exp1"]
    variants = {variant.name: variant for variant in comparison.variants}
    capped, more = (bench.cell(comparison, variants["prumerge"], at) for at in (0.8, 0.7))
    # The attention of a random tower leaves few patches, far from either cap.
    assert capped["cost_fraction"] == more["cost_fraction"] < 0.6
    fixed = bench.cell(comparison, variants["uniform"], 0.8)
    assert 0.6 < fixed["cost_fraction"] <= 0.8


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_variant_can_learn_at_its_least_budget(tmp_path, name):
    graph = lowered_graph(find_model("deep-llava", False))[0]
    load = Workload.default(graph, text_tokens=16, new_tokens=0)
    for variant in COMPARISONS[name].variants:
        settings = [f"output_dir={tmp_path}", *variant.settings]
        _, config = load_recipe(controllers.CONFIG, settings)
        if variant.selector is None and config.least_budget:
            layout_of(config.switches, graph).under(load).limit(Budget.of(config.least_budget))


def test_a_variant_that_cannot_be_trained_is_no_cell_that_cannot_be_had(base, tmp_path):
    folder = write_small_llava(tmp_path / "base")
    settings = (f"model={folder}", "max_steps=1", "batch_size=2", "least_budget=0.01")
    comparison = COMPARISONS["exp2"]
    with pytest.raises(InputError, match="'all' cannot be trained: flops=0"):
        Measuring(tmp_path, 0, 5, settings, print).cell(comparison, comparison.variants[0], 0.9)


def test_a_page_can_be_of_cells_that_cannot_be_had_alone(tmp_path):
    results = {
        "experiment": "exp1",
        "title": "Image tokens",
        "command": "planner experiment exp1",
        "samples": 4,
        "rows": [],
        "infeasible": [{"variant": "fastv", "budget": 0.1, "seed": 0, "infeasible": "too little"}],
        "differences": [],
    }
    write_results(results, tmp_path)
    assert "fastv at 10%: too little." in (tmp_path / "exp1.md").read_text()


def test_a_page_has_its_rows_differences_and_command(tmp_path):
    rows = [cell("all", s, "1101") for s in (0, 1)] + [cell("static", s, "1001") for s in (0, 1)]
    results = {
        "experiment": "exp2",
        "title": "One axis, two or all three",
        "command": "planner experiment exp2 --seeds 0,1 --samples 4",
        "samples": 4,
        "rows": [{k: v for k, v in row.items() if k != "right"} for row in rows],
        "infeasible": [{"variant": "depth", "budget": 0.4, "seed": 0, "infeasible": "too little"}],
        "differences": list(compared(rows, "all", resamples=50)),
        "learning": [{"variant": "grpo", "seed": 0, "steps": None, "curve": []}],
    }
    write_results(json.loads(json.dumps(results)), tmp_path)
    text = (tmp_path / "exp2.md").read_text()
    assert text == comparison_markdown(results)
    for part in (
        "| all | 50% | 50.0% | 75.0 ± 0.0 | 99.0% | 0 | 3 | 50.0 |",
        "| static | 50% | -25.0 |",
        "| grpo | never |",
        "depth at 40%: too little.",
        "    planner experiment exp2 --seeds 0,1 --samples 4",
    ):
        assert part in text
    assert (tmp_path / "exp2.svg").read_text().count("</svg>") == 1
    saved = json.loads((tmp_path / "exp2.json").read_text())
    assert {"command", "rows"} <= set(saved)
    assert {"variant", "budget", "seed", "accuracy", "cost_fraction", "utilisation"} <= set(
        saved["rows"][0]
    )


def test_a_static_plan_s_own_weights_are_trained_for_it(base, tmp_path, monkeypatch):
    folder = write_small_llava(tmp_path / "base")
    comparison = COMPARISONS["exp2"]
    tuned = next(v for v in comparison.variants if v.plans == "tuned")
    row = [25, *[1] * 26]
    row[3:10] = [0] * 7
    cell = Measuring.cell

    def known(self, comparison, variant, budget):
        if variant.plans == "static":
            return {"plan": row}
        return cell(self, comparison, variant, budget)

    monkeypatch.setattr(Measuring, "cell", known)
    settings = [f"model={folder}", "max_steps=1", "batch_size=2", "least_budget=0.5"]
    bench = Measuring(tmp_path / "work", 0, 5, tuple(settings), print)
    begun = next(v for v in comparison.variants if v.plans == "tuned from static")
    assert bench.cell(comparison, begun, 0.9)["violations"] == 0
    shutil.rmtree(tmp_path / "work" / "models")
    found = bench.cell(comparison, tuned, 0.9)
    assert found["plan"] == row
    assert found["plans"] == 1
    trained, *_ = load_model(str(next((tmp_path / "work" / "models").iterdir()) / "model"))
    first = load_model(str(folder))[0].state_dict()
    moved = {n for n, tensor in trained.state_dict().items() if not torch.equal(tensor, first[n])}
    assert any("mlp" in name for name in moved)
