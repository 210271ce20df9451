"""The page about realised time shows every run on record."""

import importlib.util
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
    spec = importlib.util.spec_from_file_location(
        "benchmark_of_realised", ROOT / "benchmarks" / "realised.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(folder)
    del sys.modules[spec.name], sys.modules["by_hand"]


def test_docs_show_the_history(realised):
    page = (ROOT / "docs" / "realised.md").read_text(encoding="utf-8")
    assert realised.shown(read_json(HISTORY, "history")) in page


def test_a_run_is_added_to_those_before(realised, tmp_path):
    path = tmp_path / "history.json"
    runs = read_json(HISTORY, "history")
    for run in runs:
        realised.add_to(path, run)
    assert read_json(path, "history") == runs


def test_models_are_in_the_precision_that_is_asked_for(realised, monkeypatch):
    for name, value in {"WIDTH": 64, "LAYERS": 1}.items():
        monkeypatch.setattr(realised, name, value)
    for kind in ("decoder", "llava"):
        model, inputs = realised.build(kind, torch.bfloat16)
        assert model(**inputs, logits_to_keep=1).logits.dtype == torch.bfloat16
