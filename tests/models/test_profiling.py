"""Measuring a device, on grids of a few sizes: that it is done, kept, continued, and fitted."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch

from planner.cli import execute
from planner.ir.cost.measured_device import MeasuredDevice, Measurement
from planner.ir.errors import InputError
from planner.kernels.ops import product_probe
from planner.models.profiling import device_profile, operator_cases, sweep
from planner.models.profiling.operator_cases import AXES, Bench, Case
from planner.models.profiling.stopwatch import CudaStopwatch, Stopwatch, stopwatch_for
from planner.models.profiling.sweep import table_of
from planner.models.profiling.whole_passes import Subject, Timed, fitted
from planner.planning.compiler import find_device

FEW = {
    "product": ((1, 4, 30, 200), (64, 600), (64, 600)),
    "prefill": ((1, 2), (16, 64), (32,)),
    "decode": ((1, 2), (8, 16), (32,), (1, 2)),
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Grids of few sizes, a small pool, one small model and few passes."""
    axes = {name: FEW.get(name, ((64, 4096),)) for name in AXES}
    monkeypatch.setenv("PLANNER_CACHE", str(tmp_path / "cache"))
    for module in (operator_cases, sweep):
        monkeypatch.setattr(module, "AXES", axes)
    monkeypatch.setattr(operator_cases, "_HELD_OUT", dict.fromkeys(axes, 1))
    monkeypatch.setattr(operator_cases, "_POOL_MEGABYTES", {"cpu": 4})
    monkeypatch.setattr(sweep, "_SECONDS", 1e-6)
    monkeypatch.setattr(device_profile, "_SUBJECTS", ((64, 2, True),))
    monkeypatch.setattr(device_profile, "_MOST_TOKENS", 12)
    monkeypatch.setattr(device_profile, "_FITTED", 6)
    monkeypatch.setattr(device_profile, "_CHECKED", 3)
    product_probe.fastest.cache_clear()
    yield axes
    product_probe.fastest.cache_clear()


def cpu(dtype=torch.float32):
    return Bench(torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_case_runs_an_operator_of_its_size(small, dtype):
    bench = cpu(dtype)
    cases = [*bench.cases(), *bench.held_out()]
    assert {case.table for case in cases} == set(AXES)
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        first, second = bench.runs(case, 2)
        result = first()
        second()
        if case.table == "product":
            assert result.shape == (case.sizes[0], case.sizes[2])
            assert result.dtype == dtype


def test_a_device_file_is_made_and_plans_take_it(small, tmp_path, capsys):
    path = tmp_path / "here.json"
    assert execute(["calibrate", "-o", str(path), "--rounds", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["errors"]) == {"operators", "passes"}
    assert told["machine"]["threads"] == torch.get_num_threads()
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["here.json"]
    found = find_device(str(path))
    assert set(AXES) <= set(found.measured["float32"].tables)
    assert execute(["inspect", "-m", "tiny-llava", "--device", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["seconds"] > 0
    # Another precision is added.
    again = ["calibrate", "-o", str(path), "--rounds", "1", "--dtype", "bfloat16", "-q"]
    assert execute(again) == 0
    assert set(find_device(str(path)).measured) == {"float32", "bfloat16"}


def test_a_run_that_was_cut_short_goes_on(small, monkeypatch, tmp_path):
    bench, partial, progress = cpu(), tmp_path / "partial", lambda done, total: None
    cases = bench.cases()
    monkeypatch.setattr(sweep, "_SAVED_EVERY", 5)

    def stop(done, total):
        if done > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(bench, cases, 2, partial, "here", stop)
    kept = json.loads(partial.read_text())["seconds"]
    assert len(kept) == 10
    found = sweep.sweep(bench, cases, 1, partial, "here", progress)
    assert {key: found[key] for key in kept} == {key: timed[0] for key, timed in kept.items()}
    with pytest.raises(InputError, match="another machine"):
        sweep.sweep(bench, cases, 1, partial, "there", progress)


def test_a_table_grows_and_says_what_is_missing_in_proportion(small):
    axes = small["product"]
    sizes = list(itertools.product(*axes))
    noisy = {s: math.prod(s) * (1 + 0.3 * (n % 3)) for n, s in enumerate(sizes)}
    del noisy[sizes[-1]]
    found = table_of("product", noisy)
    rows = [found.at(*s) for s in sizes]
    for one, other in itertools.product(range(len(sizes)), repeat=2):
        if all(a <= b for a, b in zip(sizes[one], sizes[other])):
            assert rows[one] <= rows[other]
    smaller = found.at(axes[0][-2], axes[1][-1], axes[2][-1])
    assert rows[-1] >= smaller * axes[0][-1] / axes[0][-2] * 0.999


def test_what_passes_take_besides_is_found(small):
    subject = Subject.of(cpu(), 64, 2, sees=True)
    tables = {
        name: table_of(name, {s: 1e-9 * math.prod(s) for s in itertools.product(*axes)})
        for name, axes in small.items()
    }
    bare = MeasuredDevice("x", 1, 1, 1, "", {}, {"float32": Measurement(tables)})
    true = {"products": 1.2, "attention": 0.9, "light": 1.1}
    known = Measurement(tables, 3e-5, 2e-3, true)
    real = replace(bare, measured={"float32": known})
    rng = random.Random(0)
    passes = []
    for number in range(30):
        one = subject.draw(rng, 200, decodes=number % 3 == 0)
        passes.append(Timed(subject, one, one.predicted(subject.graph, real)))
    found = fitted(bare, passes).measured["float32"]
    assert found.pass_seconds == pytest.approx(2e-3, rel=0.02)
    assert found.operator_seconds == pytest.approx(3e-5, rel=0.02)
    assert found.factors == pytest.approx(true, rel=0.05)


def test_a_pass_is_priced_as_the_solver_prices_it(small):
    from planner.planning.plan_costs import pricing_for

    subject = Subject.of(cpu(), 64, 3, sees=True)
    tables = {
        name: table_of(name, {s: 1e-9 * math.prod(s) for s in itertools.product(*axes)})
        for name, axes in small.items()
    }
    known = Measurement(tables, 1e-6, 1e-4, {"products": 1.2})
    device = MeasuredDevice("x", 1, 1, 1, "", {}, {"float32": known})
    for seed in range(6):
        one = subject.draw(random.Random(seed), 50, decodes=False)
        pricing = pricing_for(one.plan, subject.graph, one.load, "model", device)
        predicted = one.predicted(subject.graph, device)
        assert pricing.cost_of(one.plan)["latency"] == pytest.approx(predicted, rel=0.01)


def test_products_are_by_what_multiplies_fastest(small, monkeypatch):
    bench = cpu()
    if len(bench.backends) < 2:
        pytest.skip("there is nothing to choose from")
    cases = [case for case in bench.cases() if case.table == "product"]
    monkeypatch.setattr(device_profile, "SMALL", 1)
    seconds = {c.key: 2.0 if (c.backend == "mkl") == (c.sizes[0] < 24) else 1.0 for c in cases}
    chosen = device_profile._chosen(bench, cases, seconds)
    assert {chosen(case) for case in cases if case.sizes[0] < 24} == {"onednn"}
    assert {chosen(case) for case in cases if case.sizes[0] >= 24} == {"mkl"}
    # And that is how this machine multiplies from now on.
    assert product_probe.fastest(torch.get_num_threads()) == (True, True, False, False)


def test_a_cuda_device_is_timed_by_its_own_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, other):
            return 5.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    watch = stopwatch_for(torch.device("cuda"))
    assert isinstance(watch, CudaStopwatch)
    assert watch.seconds([lambda: log.append("run")] * 2) == 5e-3
    assert log == ["wait", "record", "run", "run", "record", "wait"]


def test_one_thread_is_timed_by_what_the_process_computes(monkeypatch):
    clock = iter([1.0, 3.5])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("time.process_time", lambda: next(clock))
    assert Stopwatch().seconds([]) == 2.5


def test_a_cuda_machine_has_larger_cases_and_one_backend():
    bench = Bench(torch.device("cuda"), torch.bfloat16)
    assert list(bench.backends) == ["cublas"]
    bench.__dict__["pool"] = torch.empty(2**29, device="meta")
    assert len(bench.cases()) > len(
        replace(bench, place=torch.device("cpu"))._at_hand(
            Case(table, sizes) for table, axes in AXES.items() for sizes in itertools.product(*axes)
        )
    )


@pytest.mark.parametrize(
    "options",
    [["-o", "x.txt"], ["-o", "x.json", "--rounds", "0"], ["-o", "x.json", "--on", "cuda"]],
)
def test_bad_options_are_refused(options, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert execute(["calibrate", *options]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
