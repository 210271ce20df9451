"""The table of Dynamic-LLaVA: answers fed token by token, cells measured once, a page."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from planner.cli import execute
from planner.loading import load_model
from planner.training.data import Packer, SceneQuestions
from planner.training.data.packing import IGNORE
from planner.training.experiments import sparse_answers
from planner.training.experiments.sparse_answers import METHODS, Method, dynamic_page, feed


@torch.no_grad()
def test_what_is_fed_costs_what_a_whole_pass_says():
    """Answers of different lengths, prompts padded on the left."""
    model, processor, _ = load_model("tiny-llava")
    questions = SceneQuestions("test", 4, 0, ("describe", "count"))
    samples = [questions[i] for i in range(4)]
    found = feed(model, processor, samples)
    packer = Packer(processor, 400, dialogue_share=1.0)
    for told, sample in zip(found, samples, strict=True):
        batch = packer([sample])
        labels = batch.pop("labels")[0]
        logits = model(**batch).logits[0]
        expected = cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
        assert told.loss == pytest.approx(float(expected), rel=1e-3, abs=1e-4)
        assert told.tokens == int((labels != IGNORE).sum())
        assert told.prompt + told.tokens == len(labels)


def test_the_command_trains_measures_and_goes_on(tmp_path, monkeypatch, capsys):
    trained = next(method for method in METHODS if method.name == "both predictors")
    few = (METHODS[0], trained, Method("answer: recent", "", "answer:recent"))
    monkeypatch.setattr(sparse_answers, "METHODS", few)
    work, out = tmp_path / "work", tmp_path / "out"
    asked = ["experiment", "dynamic", "--seeds", "0", "--samples", "2", "--work", str(work)]
    asked += ["--set", "max_steps=1", "--set", "batch_size=2", "-o", str(out), "--json"]
    assert execute(asked) == 0
    capsys.readouterr()
    for measured in ("_measure", "_timed"):
        monkeypatch.setattr(sparse_answers._Bench, measured, lambda *_: pytest.fail("again"))
    assert execute(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "dynamic.json").read_text())
    base, both, recent = found["rows"]
    assert (both["rates"], base["rates"]) == ([0.2, 0.5], None)
    assert base["kv_fraction"] == base["flops_fraction"] == 1
    assert both["flops_fraction"] < 1
    assert recent["kv_bytes"] < base["kv_bytes"]
    assert base["speed"] == 1
    assert both["speed"] > 0
    assert recent["against_base"]["low"] <= recent["against_base"]["difference"]
    page = dynamic_page(found)
    assert (out / "dynamic.md").read_text() == page
    assert sum(line.startswith("| ") for line in page.splitlines()) == 4
