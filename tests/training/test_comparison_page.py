"""The comparison of controllers: what is resampled, what is kept, and how a page says it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_llava import write_small_llava

from planner.ir.errors import InputError
from planner.training.experiments import (
    comparison_page,
    controllers,
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
    steps_to_stable,
)
from planner.training.experiments.kept_results import Runs
from planner.training.experiments.published_cells import Published, as_measured, as_published


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
