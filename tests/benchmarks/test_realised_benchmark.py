"""The page about realised time shows every run on record; compiled models are held to it, too."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from planner.documents import read_json

ROOT = Path(__file__).parents[2]
HISTORY = ROOT / "docs" / "results" / "realised.json"


@pytest.fixture(scope="module")
def realised():
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("realised")
    sys.path.remove(folder)
    for name in ("realised", "by_hand", "backend"):
        sys.modules.pop(name, None)


@pytest.fixture
def small(realised, monkeypatch):
    """The benchmark on a model of two layers."""
    for name, value in {"WIDTH": 128, "LAYERS": 2, "HEADS": 2, "GROUPS": 4, "TOKENS": 9}.items():
        monkeypatch.setattr(realised, name, value)


def test_docs_show_the_history(realised):
    page = (ROOT / "docs" / "realised.md").read_text(encoding="utf-8")
    assert realised.shown(read_json(HISTORY, "history")) in page


def test_a_run_is_added_to_those_before(realised, tmp_path):
    path = tmp_path / "history.json"
    runs = read_json(HISTORY, "history")
    for run in runs:
        realised.add_to(path, run)
    assert read_json(path, "history") == runs


def test_models_are_in_the_precision_that_is_asked_for(realised, small, monkeypatch):
    monkeypatch.setattr(realised, "TOKENS", 640)
    for kind in ("decoder", "llava"):
        model, inputs = realised.build(kind, torch.bfloat16)
        assert model(**inputs, logits_to_keep=1).logits.dtype == torch.bfloat16


def test_compiled_models_are_timed_under_plans(realised, small, monkeypatch, capsys):
    backend = importlib.import_module("backend")
    asked = ["backend.py", "--inner", "eager", "--rounds", "1", "--budgets", "0.5", "1", "--json"]
    monkeypatch.setattr(sys, "argv", asked)
    assert backend.main() == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["plan"], row["budget"]) for row in rows] == [
        (kind, budget) for kind in backend.KINDS for budget in (0.5, 1.0)
    ]
    assert all(row["score"] == pytest.approx(row["realised"] / row["ideal"]) for row in rows)
    assert 0.2 < rows[2]["ideal"] < 0.9
    assert rows[3]["ideal"] == 1
