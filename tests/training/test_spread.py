"""Labels, evaluation and audits come out the same wherever their parts are done."""

import pickle
import sys
from functools import partial

import numpy as np
import pytest

from planner.audit import Terms, audit
from planner.cli import execute as run
from planner.models.scheduling import load_deciding
from planner.planning.request import Request
from planner.training.data import SceneQuestions
from planner.training.evaluate import UnderBudgets
from planner.training.labelling import label_samples
from planner.training.question_samples import scene_samples

BUDGETS = (0.75, 1.0)


def sent(thing):
    """As another process gets it."""
    return pickle.loads(pickle.dumps(thing))


class Elsewhere:
    """A worker that has loaded for itself: the last item first, the second one twice."""

    def __init__(self, load):
        self.loaded, self.done = load(), 0

    def __call__(self, make, items):
        work = sent(make)(self.loaded)
        for index in reversed(range(len(items))):
            for _ in range(1 + (index == 1)):
                result = sent(work(sent(items[index])))
            self.done += 1
            yield index, result


def loading(scheduler=None, mask=False):
    return partial(load_deciding, Request("tiny-llava"), scheduler, 0.75, "auto", "cpu", mask)


def assert_equal(found, expected):
    for name in ("samples", "budgets", "utilities", "plans", "costs", "limits"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.losses.keys() == expected.losses.keys()
    assert all((found.losses[n] == losses).all() for n, losses in expected.losses.items())


@pytest.mark.parametrize("scheduler", [None, "adallava-l"])
def test_labels_and_their_audit(scheduler):
    load = loading(scheduler, mask=True)
    loaded, spread = load(), Elsewhere(load)
    model, graph = loaded.model, loaded.graph
    samples = scene_samples(model, loaded.processor, "train", 3, 0)
    fingerprint = graph.properties["fingerprint"]
    terms = Terms("tiny-llava", fingerprint, "adallava-l", "heuristic", 49, 16)
    label = partial(
        label_samples, model, graph, samples, terms, BUDGETS, tried=2, scheduled=loaded.scheduled
    )
    alone, seen = label(), []
    assert_equal(label(spread=spread, progress=lambda *done: seen.append(done)), alone)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    there = audit(alone, graph, exact=True, spread=Elsewhere(lambda: None)).summary
    here = audit(alone, graph, exact=True).summary
    took = ("seconds", "seconds_per_label")
    assert {k: v for k, v in there.items() if k not in took} == {
        k: v for k, v in here.items() if k not in took
    }


def test_labels_that_are_known_are_not_measured_again(tmp_path):
    load = loading()
    loaded, spread, partial_file = load(), Elsewhere(load), tmp_path / "partial"
    samples = scene_samples(loaded.model, loaded.processor, "train", 3, 0)
    terms = Terms("t", loaded.graph.properties["fingerprint"], "adallava-l", "heuristic", 49, 16)
    label = partial(label_samples, loaded.model, loaded.graph, samples, terms, BUDGETS)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(spread=spread, partial=partial_file, progress=stop)
    assert spread.done == 2
    assert_equal(label(spread=spread, partial=partial_file), label())
    assert spread.done == 3


@pytest.mark.parametrize("tokens", ["", "prumerge:max=0.9"])
@pytest.mark.parametrize("scheduler", [None, "adallava-h"])
def test_accuracy_under_budgets(scheduler, tokens):
    load = loading(scheduler)
    how = Request("tiny-llava", utilities="prior", text_tokens=16, tokens=tokens or None)
    questions = SceneQuestions("test", 8, families=["existence", "count", "spatial"])
    here = UnderBudgets(load(), questions, how, 3)
    there = UnderBudgets(load(), questions, how, 3, Elsewhere(load))
    seen = []
    found = there.measure(0.75, lambda *done: seen.append(done))
    assert found == here.measure(0.75)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    # An adaptive selector is counted with what it kept, which is less than it might.
    assert found["cost_fraction"] < 0.5 if tokens else found["cost_fraction"] > 0.6


@pytest.mark.parametrize(
    "command",
    [
        ("labels", "-m", "tiny-llava", "-o", "labels.parquet"),
        ("eval", "-m", "tiny-llava"),
        ("audit", "labels.parquet"),
    ],
)
def test_without_ray_the_commands_say_what_to_install(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "planner.ray_workers", raising=False)
    assert run([*command, "--ray", "local"]) == 2
    said = capsys.readouterr().err
    assert said == "planner: --ray needs ray: pip install 'planner[ray]'\n"
