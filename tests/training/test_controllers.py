"""The variants of a comparison: what they are trained by, and how they are measured."""

import json
import shutil

import pytest
import torch
from small_llava import write_small_llava

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.loading import load_model
from planner.models.scheduling import layout_of
from planner.planning.budgets import Budget
from planner.planning.catalog import find_model
from planner.planning.graph_cache import lowered_graph
from planner.training import evaluate
from planner.training.experiments import (
    controllers,
)
from planner.training.experiments.comparisons import COMPARISONS
from planner.training.experiments.controllers import (
    Measuring,
    static_beside,
)
from planner.training.experiments.kept_results import Loaded
from planner.training.recipes import load_recipe


@pytest.mark.parametrize("name", COMPARISONS)
def test_variants_have_files_and_configurations_of_their_own(name, tmp_path):
    comparison = COMPARISONS[name]
    assert len({(v.name, v.plans) for v in comparison.variants}) == len(comparison.variants)
    assert set(comparison.against) <= {v.name for v in comparison.variants}
    for variant in comparison.variants:
        settings = [f"output_dir={tmp_path}", *variant.settings]
        assert load_recipe(controllers.CONFIG, settings)[1].recipe == "unified"


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
