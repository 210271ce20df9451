"""Measuring a device, on grids of a few sizes: that it is done, kept, continued, and fitted."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch

from planner.cli import execute
from planner.ir.cost.measured_device import ALONE, MeasuredDevice, Measurement, Passes
from planner.ir.errors import InputError
from planner.kernels.ops import product_probe
from planner.models.profiling import device_profile, operator_cases, pace, sweep, whole_passes
from planner.models.profiling.operator_cases import AXES, Bench, Case
from planner.models.profiling.pace import PacedStopwatch, Taken
from planner.models.profiling.stopwatch import CudaStopwatch, Stopwatch, stopwatch_for
from planner.models.profiling.subjects import STEPS, Subject
from planner.models.profiling.sweep import Partial, table_of
from planner.models.profiling.whole_passes import Timed, fitted, late_by
from planner.planning.compiler import find_device

FEW = {
    "product": ((1, 4, 30, 200), (64, 600), (64, 600)),
    "weights": ((1, 30),),
    "cached": ((1, 2, 4),),
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
    # In one order: what is drawn for a table depends on those before it.
    held_out = sorted({"cold", *axes} - {"weights", "cached"})
    monkeypatch.setattr(operator_cases, "_HELD_OUT", dict.fromkeys(held_out, 1))
    for name, sizes in (("_ROWS", (1, 8, 50, 200)), ("_FEW_ROWS", (1, 30)), ("_COMPARED", (600,))):
        monkeypatch.setattr(operator_cases, name, sizes)
    monkeypatch.setattr(operator_cases, "_SQUARES", (64, 600))
    monkeypatch.setattr(operator_cases, "_CACHED_MEGABYTES", 1)
    monkeypatch.setattr(operator_cases, "_CACHED_FEATURES", 64)
    monkeypatch.setattr(operator_cases, "_POOL_MEGABYTES", {"cpu": 4})
    monkeypatch.setattr(sweep, "_SECONDS", 1e-6)
    monkeypatch.setattr(device_profile, "_SUBJECTS", ((64, 2, True), (128, 2, False)))
    monkeypatch.setattr(device_profile, "_MOST_TOKENS", 12)
    monkeypatch.setattr(device_profile, "_PASSES", 8)
    monkeypatch.setattr(device_profile, "_OF_MODEL", 8)
    monkeypatch.setattr(whole_passes, "_SECONDS", 0)
    product_probe.other_is_faster.cache_clear()
    yield axes
    product_probe.other_is_faster.cache_clear()


def cpu(dtype=torch.float32):
    return Bench(torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_case_runs_an_operator_of_its_size(small, dtype):
    bench = cpu(dtype)
    cases = [*bench.cases(), *bench.held_out()]
    assert {case.table for case in cases} == {"cold", *AXES}
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        if case.is_product:
            case = replace(case, backend=next(iter(bench.backends)))
        if case.table == "weights":  # the difference of two products
            case = case.of("cold")
        first, second = bench.runs(case, 2)
        result = first()
        second()
        if case.is_product:
            assert result.shape == (case.sizes[0], case.sizes[2])
            assert result.dtype == dtype


def test_a_device_file_is_made_and_plans_take_it(small, tmp_path, capsys):
    path = tmp_path / "here.json"
    assert execute(["calibrate", "-o", str(path), "--rounds", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["errors"]) == ["operators", "prompts of any model", "tokens of any model"]
    assert told["machine"]["threads"] == torch.get_num_threads()
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["here.json"]
    found = find_device(str(path))
    assert set(AXES) <= set(found.measured["float32"].tables)
    assert execute(["inspect", "-m", "tiny-llava", "--device", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["seconds"] > 0
    # Another precision is added, and then what one model takes.
    again = ["calibrate", "-o", str(path), "--rounds", "1", "--json"]
    assert execute([*again, "--dtype", "bfloat16"]) == 0
    both = find_device(str(path)).measured
    assert set(both) == {"float32", "bfloat16"}
    capsys.readouterr()
    assert execute([*again, "--model", "tiny-llava", "--text-tokens", "20"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "prompts of tiny-llava" in told["errors"]
    now = find_device(str(path)).measured
    assert len(now["float32"].models) == 1
    assert replace(now["float32"], models={}) == both["float32"]
    assert now["bfloat16"] == both["bfloat16"]
    assert execute(["inspect", "-m", "tiny-llava", "--device", str(path), "-q"]) == 0
    # What another machine has measured is not written over.
    capsys.readouterr()
    whole = path.read_text()
    path.write_text(whole.replace('"processor": "', '"processor": "Another '))
    other = path.read_text()
    assert other != whole
    assert execute(again) == 2
    assert "is of another machine or other libraries (processor Another " in capsys.readouterr().err
    assert path.read_text() == other
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["here.json"]


def test_a_run_that_was_cut_short_goes_on(small, monkeypatch, tmp_path):
    bench, path, progress = cpu(), tmp_path / "partial", lambda done, total: None
    cases = [replace(c, backend="mkl") if c.is_product else c for c in bench.cases()]
    monkeypatch.setattr(sweep, "_SAVED_EVERY", 5)

    def stop(done, total):
        if done > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(bench, cases, 2, Partial.at(path, "here"), stop)
    kept = Partial.at(path, "here").taken
    assert len(kept) == 10
    partial = Partial.at(path, "here")
    found = sweep.sweep(bench, cases, 1, partial, progress)
    pace = partial.pace
    assert {k: found[k] for k in kept} == {k: timed[0].at(pace) for k, timed in kept.items()}


@pytest.mark.parametrize(
    "text",
    [
        '{"facts": "there", "taken": {}}',
        '{"facts": "here", "seconds": {}}',
        '{"facts": "here", "taken": {"a": [1.5]}}',
        "{",
        "[]",
    ],
)
def test_a_partial_file_that_is_broken_or_of_another_machine_is_refused(text, tmp_path):
    path = tmp_path / "partial"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        Partial.at(path, "here")
    assert "\n" not in str(caught.value)


def test_passes_go_on_where_they_were(small, monkeypatch, tmp_path):
    subject = Subject.made(cpu(), 64, 2)
    path, ran = tmp_path / "partial", []

    def interleaved(group):
        ran.append(len(group))
        if len(ran) == 2:
            raise KeyboardInterrupt
        return [[Taken(1.0 + len(ran), 1.0), Taken(2.0, 1.0), Taken(3.0, 1.0)] for _ in group]

    def run():
        partial = Partial.at(path, "here")
        return whole_passes.timed([subject], 20, 9, 0, partial, lambda done, total: None, 2.0)

    monkeypatch.setattr(whole_passes, "interleaved", interleaved)
    with pytest.raises(KeyboardInterrupt):
        run()
    found = run()
    # The first eight were kept, and the others are what they would have been.
    assert ran == [8, 8, 8, 4]
    assert [one.every[0].seconds for one in found] == [2.0] * 8 + [4.0] * 8 + [5.0] * 4
    # At half the pace all takes twice as long.
    assert {one.seconds for one in found} == {4.0, 6.0}
    assert [one.one for one in found] == [one.one for one in run()]
    assert ran == [8, 8, 8, 4]


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


def tables_of(axes):
    """Seconds in proportion to every size."""
    tables = {
        name: table_of(name, {s: 1e-9 * math.prod(s) for s in itertools.product(*sizes)})
        for name, sizes in axes.items()
    }
    return {**tables, "weights": table_of("weights", {(1,): 1e-4, (30,): 2e-4})}


def passes_of(subject, device, count=40, noise=()):
    """Random passes that take what a device predicts, each again and again."""
    rng = random.Random(0)
    drawn = [subject.draw(rng, 200, decodes=number % 3 == 0) for number in range(count)]
    again = [1.0, *(1 + share for share in noise)]
    seconds = [one.predicted(subject.graph, device) for one in drawn]
    every = [[Taken(s * n, 1.0) for n in again] for s in seconds]
    return [Timed(subject, one, some, 1.0) for one, some in zip(drawn, every)]


@pytest.fixture
def bare(small):
    """A device where passes take what their operators take alone."""
    known = {"float32": Measurement(tables_of(small))}
    return MeasuredDevice("x", 1, 1, 1, "", {}, known)


def of_model(device, subject, **prompt):
    """The device where passes of a model take these terms."""
    terms = {**ALONE, "pass": 2e-3, "operator": 3e-5, "products": 1.2, "attention": 0.9, **prompt}
    own = {"prompt": Passes(terms), "token": Passes({**terms, "products": 0.4, "operator": 1e-5})}
    fingerprint = str(subject.graph.properties["fingerprint"])
    known = replace(device.measured["float32"], models={fingerprint: own})
    return replace(device, measured={"float32": known})


def test_what_passes_of_a_model_take_is_found_and_predicted(bare):
    subject = Subject.made(cpu(), 64, 3, sees=True)
    real = of_model(bare, subject, encoder=2.5)
    usual = bare.measured["float32"].passes
    found = fitted(bare, passes_of(subject, real), usual)
    for passes in found.values():
        assert passes.errors["p95"] < 0.01
        assert passes.late < 0.01
    known = replace(
        bare.measured["float32"], models={subject.graph.properties["fingerprint"]: found}
    )
    fit = replace(bare, measured={"float32": known})
    for seed in range(100, 105):
        one = subject.draw(random.Random(seed), 200, decodes=seed % 2 == 0)
        wanted = one.predicted(subject.graph, real)
        assert one.predicted(subject.graph, fit) == pytest.approx(wanted, rel=0.02)
    # No term is negative, so more never takes less.
    assert min(min(passes.terms.values()) for passes in found.values()) >= 0


def test_of_several_models_errors_are_of_one_that_was_left_out(bare):
    """One of them takes twice as long as the other two: nobody could know."""
    subjects = [Subject.made(cpu(), width, 2) for width in (64, 128, 192)]
    slow = bare.with_terms(4, {**ALONE, "products": 2.0, "attention": 2.0, "light": 2.0})
    devices = (bare, bare, slow)
    passes = [one for s, d in zip(subjects, devices) for one in passes_of(s, d, 12)]
    found = fitted(bare, passes)["prompt"]
    assert 0.35 < found.errors["p95"] < 0.65
    assert found.late > 0.5


def test_a_few_slow_passes_change_little(bare):
    subject = Subject.made(cpu(), 64, 2)
    passes = passes_of(subject, of_model(bare, subject))
    slow = [
        replace(one, every=[Taken(3 * one.seconds, 1.0)]) if n in (5, 6) else one
        for n, one in enumerate(passes)
    ]
    usual = bare.measured["float32"].passes
    before, after = (fitted(bare, some, usual)["prompt"] for some in (passes, slow))
    assert after.errors["median"] < 0.03
    assert after.terms["operator"] == pytest.approx(before.terms["operator"], rel=0.2)


def test_late_is_what_one_in_a_hundred_is():
    shares = [n / 1000 for n in range(1000)]
    assert late_by(random.Random(0).sample(shares, 1000)) == pytest.approx(0.99, abs=0.002)
    # Of few it cannot be told; the latest is taken. Nobody is given more time for being early.
    assert late_by([0.1, 0.3, -0.2]) == 0.3
    assert late_by([-0.5]) == 0


def test_a_pass_is_priced_as_the_solver_prices_it(bare):
    from planner.planning.plan_costs import pricing_for

    subject = Subject.made(cpu(), 64, 3, sees=True)
    device = of_model(bare, subject)
    for seed in range(6):
        one = subject.draw(random.Random(seed), 50, decodes=False)
        chip = device.on(subject.graph)
        pricing = pricing_for(one.plan, subject.graph, one.load, "model", chip)
        predicted = one.predicted(subject.graph, device)
        assert pricing.cost_of(one.plan)["latency"] == pytest.approx(predicted, rel=0.01)


def test_a_prompt_is_as_long_as_was_drawn():
    subject = Subject.made(cpu(), 64, 2, sees=True)
    one = subject.draw(random.Random(3), 60, decodes=False)
    seen = []
    subject.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with subject.session.under(one.plan):
        subject.prompt(one)()
        subject.tokens(one)()
    assert seen == [(1, one.load.prompt_tokens)] * 2 + [(1, 1)] * STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_by_what_multiplies_fastest(small, monkeypatch, dtype):
    bench = cpu(dtype)
    if len(bench.backends) < 2:
        pytest.skip("there is nothing to choose from")
    usual, other = bench.backends
    cases = bench.compared()
    monkeypatch.setattr(device_profile, "SMALL", 1)
    seconds = {c.key: 2.0 if (c.backend == usual) == (c.sizes[0] < 24) else 1.0 for c in cases}
    chosen = device_profile._chosen(bench, cases, seconds)
    assert {chosen(case) for case in cases if case.sizes[0] < 24} == {other}
    assert {chosen(case) for case in cases if case.sizes[0] >= 24} == {usual}
    # And that is how this machine multiplies from now on.
    faster = product_probe.other_is_faster(torch.get_num_threads(), dtype)
    assert faster == (True, True, False, False)


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


def test_what_a_slow_machine_takes_counts_as_if_it_were_not(small, monkeypatch):
    """A clock on which everything takes twice as long for a while; ratios stay what they were."""
    bench, now, slow = cpu(), [0.0], [1.0]

    def work(seconds):
        def run():
            now[0] += seconds * slow[0]

        return run

    class Clock(Stopwatch):
        def __init__(self):
            self._now = lambda: now[0]

    monkeypatch.setattr(pace, "stopwatch_for", lambda place: Clock())
    monkeypatch.setattr(pace, "_FRESH", -1)
    watch = PacedStopwatch(bench)
    watch._product = [work(0.5)]
    first = watch.seconds([work(3.0)])
    slow[0] = 2.0
    second = watch.seconds([work(3.0)])
    assert (first.seconds, second.seconds) == (3.0, 6.0)
    assert first.at(0.5) == second.at(0.5) == 3.0
    assert second.at(1.0) == 6.0


def test_promises_are_by_the_clock(bare):
    """Every third time the machine was slower: predictions know nothing of it, the margin does."""
    subject = Subject.made(cpu(), 64, 2)
    passes = [
        replace(one, every=[Taken(n * one.seconds, n) for n in (1.0, 1.0, 1.5)])
        for one in passes_of(subject, of_model(bare, subject))
    ]
    found = fitted(bare, passes, bare.measured["float32"].passes)["prompt"]
    assert found.errors["p95"] < 0.01
    assert found.late == pytest.approx(0.5, abs=0.02)


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
            Case(table, sizes)
            for table, axes in AXES.items()
            if table != "weights"
            for sizes in itertools.product(*axes)
        )
    )


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "x.txt"],
        ["-o", "x.json", "--rounds", "0"],
        ["-o", "x.json", "--on", "cuda"],
        ["-o", "x.json", "--threads", "9999"],
    ],
)
def test_bad_options_are_refused(options, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert execute(["calibrate", *options]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
