"""Predictions are held against what passes take, and deadlines against plans for them."""

import importlib.util
import itertools
import math
import random
from pathlib import Path

import pytest
import torch

from planner.ir.cost.measured_device import MeasuredDevice, Measurement, Table
from planner.models.profiling import whole_passes
from planner.models.profiling.operator_cases import Bench
from planner.models.profiling.pace import Taken
from planner.models.profiling.subjects import Subject
from planner.models.profiling.sweep import Partial
from planner.planning.device_file import read_device, save_device

PATH = Path(__file__).parents[2] / "benchmarks" / "latency.py"


@pytest.fixture
def latency(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_of_latency", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "MOST_TOKENS", 8)
    monkeypatch.setattr(module, "TEXTS", (4, 8))
    monkeypatch.setattr(module, "SHARES", (0.8,))
    monkeypatch.setattr(module, "LADDER", (0.7, 0.8, 1.0))
    return module


@pytest.fixture
def device(tmp_path):
    axes = ((1.0, 1e3), (1.0, 1e4), (1.0, 1e4))
    seconds = tuple(1e-12 * math.prod(sizes) for sizes in itertools.product(*axes))
    known = Measurement({"product": Table(axes, seconds)})
    path = tmp_path / "here.json"
    made = MeasuredDevice(str(path), 1.0, 100.0, 1.0, "", {}, {"float32": known})
    save_device(path, made)
    return made


@pytest.fixture
def subject(monkeypatch):
    monkeypatch.setattr("planner.models.profiling.operator_cases._POOL_MEGABYTES", {"cpu": 4})
    return Subject.made(Bench(torch.device("cpu"), torch.float32), 64, 3, True)


def test_errors_are_of_what_passes_take(latency, device, subject, monkeypatch, tmp_path):
    def doubled(group):
        taken = [2 * one.predicted(subject.graph, device) for subject, one in group]
        return [[Taken(seconds, 1.0)] * 3 for seconds in taken]

    monkeypatch.setattr(whole_passes, "interleaved", doubled)
    partial = Partial.at(tmp_path / "partial", "here")
    found = latency.plans([subject], {"so": device}, 8, partial, 1.0)
    assert found["the machine's pace"]["p95"] == 0
    assert found["all, by the clock"]["bias"] == -0.5
    assert found["all, so"]["bias"] == found["all, so"]["p95"] * -1 == -0.5
    assert [found[f"{name}, so"]["count"] for name in ("all", "prompts", "tokens")] == [8, 6, 2]
    assert found["repeats differ"]["median"] == 0


def test_models_are_measured_first(latency, device, subject, monkeypatch, tmp_path):
    def doubled(group):
        taken = [2 * one.predicted(subject.graph, device) for subject, one in group]
        return [[Taken(seconds, 1.0)] * 3 for seconds in taken]

    monkeypatch.setattr(whole_passes, "interleaved", doubled)
    known = latency.calibrated([subject], device, tmp_path)
    one = subject.draw(random.Random(1), 8, decodes=False)
    seconds = [one.predicted(subject.graph, which) for which in (device, known)]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.02)
    assert read_device(tmp_path / "device.json") == known


@pytest.mark.parametrize(("taken", "on_time", "used"), [(0.5, 1, 0.5), (2.0, 0, 1.0)])
def test_deadlines_are_kept_where_passes_take_no_longer(
    latency, device, subject, monkeypatch, taken, on_time, used
):
    served = []

    class Watch:
        def seconds(self, runs):
            (run,) = runs
            run()
            served.append(run)
            return taken * deadlines[run]

    deadlines = {}
    planned = latency.planned

    def remembered(*arguments):
        found = planned(*arguments)
        deadlines[found.serve] = found.due
        return found

    monkeypatch.setattr(latency, "planned", remembered)
    monkeypatch.setattr(latency, "stopwatch_for", lambda place: Watch())
    found = latency.requests(subject, device, 6)["by the file"]
    assert len(served) == 12  # each by the file, and by a governor
    assert found["on time"] == on_time
    assert found["utilisation"] == pytest.approx(used)


def test_a_governor_follows_a_machine_that_has_become_slower(latency, device, subject, monkeypatch):
    """All takes 1.6 times as long as predicted: the file's plans are late, a governor's are not."""
    found = {}

    class Watch:
        def seconds(self, runs):
            (run,) = runs
            return 1.6 * found[run].seconds

    planned = latency.planned

    def remembered(*arguments):
        one = planned(*arguments)
        found[one.serve] = one
        return one

    monkeypatch.setattr(latency, "SHARES", (1.3,))
    monkeypatch.setattr(latency, "LADDER", (0.3, 0.65, 0.7, 0.75, 0.8, 1.0, 1.3))
    monkeypatch.setattr(latency, "planned", remembered)
    monkeypatch.setattr(latency, "stopwatch_for", lambda place: Watch())
    kept = latency.requests(subject, device, 40)
    assert kept["by the file"]["on time"] == 0
    assert kept["by a governor"]["on time"] > 0.9
    assert kept["by a governor"]["utilisation"] > 0.7
