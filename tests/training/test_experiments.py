"""Tables of results: what is averaged, what is kept, and how pages say it."""

import json
import re
from pathlib import Path

import pytest

from planner.cli import execute
from planner.training.experiments import EXPERIMENTS, write_results
from planner.training.experiments.cells import TableBench
from planner.training.experiments.definitions import TABLES
from planner.training.experiments.kept_results import Runs
from planner.training.experiments.learning import learned
from planner.training.experiments.table_page import summarise, table_markdown


def cell(method, budget, accuracy, tokens="", seed=0):
    right = round(4 * accuracy)
    return {
        "method": method,
        "rule": "base" if method == "base" else "scheduler",
        "seed": seed,
        "scores": [1.0] * right + [0.0] * (4 - right),
        "tokens": tokens,
        "budget": budget,
        "accuracy": accuracy,
        "cost_fraction": budget,
        "utilisation": 1.0,
        "success": 1.0,
        "families": {"count": accuracy, "text": 1.0},
    }


def learning(method, seed, losses):
    regret = [
        {"budget": b, "label": b + seed, "solver": 0, "static": 1, "random": 2} for b in (0.5, 0.75)
    ]
    return {"method": method, "seed": seed, "regret": regret, "losses": losses}


def results():
    cells = [cell("a", 1.0, 0.5), cell("b", 0.5, 0.25), cell("a", 1.0, 0.7), cell("b", 0.5, 0.25)]
    rows = [
        learning("a", 0, [(20, 1.0), (50, 2.0), (51, 8.0), (100, 4.0)]),
        learning("b", 0, []),
        learning("a", 1, [(50, 3.0), (100, 6.0)]),
        learning("b", 1, []),
    ]
    runs = Runs("baselines", Path("work"), (0, 1), 7, ["max_steps=3"], print)
    return runs.facts | {
        "title": "An example",
        "cells": cells,
        "summary": summarise(cells),
        "learning": rows,
        "learned": learned(rows),
    }


def test_rows_are_means_over_seeds():
    a, b = results()["summary"]
    assert (a["method"], a["accuracy"], a["families"]["count"]) == ("a", 0.6, 0.6)
    assert a["accuracy_spread"] == pytest.approx(0.2 / 2**0.5)
    assert b["accuracy_spread"] == 0


def test_losses_are_means_of_fifty_steps_and_regret_of_seeds():
    a, b = results()["learned"]
    assert a["loss"] == [(50, 2.0), (100, 6.0)]
    assert [(e["budget"], e["label"]) for e in a["regret"]] == [(0.5, 1.0), (0.75, 1.25)]
    assert b["loss"] == []


def test_a_page_holds_its_tables_plot_and_command(tmp_path):
    write_results(json.loads(json.dumps(results())), tmp_path)
    text = (tmp_path / "baselines.md").read_text()
    for line in (
        "| a | all | 100% | 100.0% | 60.0 ± 14.1 | 60.0 | 100.0 |",
        "| method | 1-50 | 51-100 |",
        "| a | 2.0000 | 6.0000 |",
        "| a | 75% | 1.2500 | 0.0000 | 1.0000 | 2.0000 |",
        "    planner experiment baselines --seeds 0,1 --samples 7 --set max_steps=3",
    ):
        assert line in text.splitlines()
    assert "| b | 0" not in text
    assert (tmp_path / "baselines.svg").read_text().count("</svg>") == 1
    assert json.loads((tmp_path / "baselines.json").read_text())["samples"] == 7


def test_pages_without_learning_have_one_table():
    plain = {k: v for k, v in results().items() if not k.startswith("learn")}
    assert sum(line.startswith("|---|") for line in table_markdown(plain).splitlines()) == 1
    assert sum(line.startswith("|---|") for line in table_markdown(results()).splitlines()) == 3


@pytest.mark.parametrize("name", TABLES)
def test_cells_have_files_of_their_own(name):
    cells = TABLES[name].cells
    assert len({c.key for c in cells}) == len(cells)


def test_cells_are_measured_once_and_again_when_something_changed(tmp_path, monkeypatch):
    measured = []
    found = {"accuracy": 0.5}
    monkeypatch.setattr(TableBench, "_measure", lambda self, c: measured.append(c) or found)
    first = TABLES["table1"].cells[1]
    for samples, overrides in ((5, ()), (5, ()), (6, ()), (6, ("max_steps=2",))):
        bench = TableBench(tmp_path, 0, samples, overrides, print)
        assert bench.measured(first) == {"accuracy": 0.5}
    assert len(measured) == 3


def test_differences_are_paired_with_the_base_model():
    """Of four questions of two seeds the first is always lost, and one seed loses another."""
    rows = [cell("base", 1.0, 1.0, seed=s) for s in (0, 1)]
    rows += [cell("a", 0.5, accuracy, seed=s) for s, accuracy in enumerate((0.75, 0.5))]
    rows += [cell("base", 1.0, 1.0, "fastv", seed=s) for s in (0, 1)]
    base, worse, equal = summarise(rows)
    assert "against_base" not in base
    found = worse["against_base"]
    assert found["difference"] == pytest.approx(-0.375)
    assert -1 <= found["low"] < -0.375 < found["high"] <= 0
    assert (equal["against_base"]["low"], equal["against_base"]["high"]) == (0, 0)
    page = {**results(), "summary": [base, worse, equal], "learned": ()}
    lines = [line for line in table_markdown(page).splitlines() if line.startswith("| ")]
    assert lines[0].split(" | ")[5] == "- base, 95 %"
    assert lines[1].split(" | ")[5] == ""
    assert lines[2].split(" | ")[5].startswith("-37.5 (")


@pytest.mark.parametrize("name", ["table1", "table3", "baselines"])
def test_the_base_model_is_beside_and_smaller_pictures_for_it(name):
    tokens = [c.tokens for c in TABLES[name].cells if c.rule == "base"]
    assert tokens[:3] == ["", "downsample:side=5", "downsample:side=4"]


def test_positions_are_compared_in_the_first_table():
    tokens = [c.tokens for c in TABLES["table1"].cells if c.rule == "base"]
    assert "prumerge+:ratio=0.125" in tokens
    assert "prumerge+:ratio=0.125,positions=original" in tokens


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--set", "foo=1"), 'unknown key "foo"|takes no --set'),
        (("--set", "max_steps=0"), '"max_steps"|takes no --set'),
        (("--seeds", "0,-1"), '"seed": Input should be greater than or equal to 0'),
    ],
)
def test_settings_are_checked_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, name, settings, message
):
    if name == "smollm2" and "--seeds" in settings:
        return
    monkeypatch.chdir(tmp_path)
    assert execute(["experiment", name, "--work", "work", "-o", "out", *settings]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "smollm2"])
def test_settings_that_fit_are_taken(tmp_path, name):
    runs = Runs(name, tmp_path, (0, 1), 8, ["max_steps=3", "batch_size=2"], print)
    EXPERIMENTS[name].check(runs)
