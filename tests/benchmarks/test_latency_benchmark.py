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
        return [[2 * one.predicted(subject.graph, device)] * 3 for subject, one in group]

    monkeypatch.setattr(whole_passes, "interleaved", doubled)
    partial = Partial.at(tmp_path / "partial", "here")
    found = latency.plans([subject], {"so": device}, 8, partial)
    assert found["all, so"]["bias"] == found["all, so"]["p95"] * -1 == -0.5
    assert [found[f"{name}, so"]["count"] for name in ("all", "prompts", "tokens")] == [8, 6, 2]
    assert found["repeats differ"]["median"] == 0


def test_models_are_measured_first(latency, device, subject, monkeypatch, tmp_path):
    def doubled(group):
        return [[2 * one.predicted(subject.graph, device)] * 3 for subject, one in group]

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
        run, deadline, share = planned(*arguments)
        deadlines[run] = deadline
        return run, deadline, share

    monkeypatch.setattr(latency, "planned", remembered)
    monkeypatch.setattr(latency, "stopwatch_for", lambda place: Watch())
    found = latency.requests(subject, device, 6)
    assert len(served) == 6
    assert found["on time"] == on_time
    assert found["utilisation"] == pytest.approx(used)
