"""Device files: written, read back, refused where broken; plans for budgets of seconds by them."""

import json
from dataclasses import replace

import pytest

from planner.ir.cost.measured_device import ALONE, MeasuredDevice, Measurement, Passes, Table
from planner.ir.errors import InputError
from planner.plan import load_plan, save_plan
from planner.planning.compiler import compile_plan, find_device
from planner.planning.device_file import save_device
from planner.planning.figures import check_figures
from planner.planning.request import Request


def measured(seconds_each=1e-12, late=0.0):
    """Products take so much for every multiply-add, and a pass a millisecond."""
    axes = ((1.0, 1000.0), (1.0, 5000.0), (1.0, 5000.0))
    seconds = tuple(seconds_each * m * k * n for m in axes[0] for k in axes[1] for n in axes[2])
    terms = {**ALONE, "pass": 1e-3, "operator": 1e-6, "products": 1.5}
    passes = {"prompt": Passes(terms, late=late), "token": Passes(terms)}
    known = Measurement({"product": Table(axes, seconds)}, passes)
    return MeasuredDevice("here", 1.0, 100.0, 16.0, "a test", {"threads": 1}, {"float32": known})


@pytest.fixture
def path(tmp_path):
    where = tmp_path / "here.json"
    save_device(where, measured())
    return where


def test_what_was_written_is_read_back(path):
    found = find_device(str(path))
    assert isinstance(found, MeasuredDevice)
    assert found.measured == measured().measured
    assert found.name == str(path)


def test_a_file_that_was_written_anew_is_read_anew(path):
    before = find_device(str(path)).measured["float32"]
    save_device(path, measured(2e-12))
    assert find_device(str(path)).measured["float32"] != before


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("planner_device"),
        lambda d: d.update(planner_device=2),  # what older versions wrote
        lambda d: d["measured"]["float32"].update(pace=0.0),
        lambda d: d["measured"]["float32"]["passes"].pop("token"),
        lambda d: d["measured"]["float32"]["passes"]["prompt"]["terms"].update(light=-1.0),
        lambda d: d.update(tflops="fast"),
        lambda d: d["measured"]["float32"]["tables"]["product"]["seconds"].pop(),
        lambda d: d["measured"]["float32"]["tables"]["product"]["axes"][0].reverse(),
    ],
)
def test_a_broken_file_is_refused_in_one_sentence(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        find_device(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.json", "abacus"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(InputError, match=name):
        find_device(name)


def request(path, budget):
    return Request("tiny-llava", budget, device=str(path), utilities="prior")


def test_seconds_are_those_that_were_measured_and_limits_on_them_hold(path, tmp_path):
    base = compile_plan(request(path, 1.0)).pricing.base["latency"]
    less = compile_plan(request(path, f"latency={base * 0.8}s"))
    assert any("--model" in note for note in less.notes)
    cost = less.plan.cost["latency"]["plan"]
    assert 0.7 * base < cost <= base * 0.8
    slower = tmp_path / "slower.json"
    save_device(slower, measured(2e-12))
    assert compile_plan(request(slower, 1.0)).pricing.base["latency"] > 1.1 * base


def test_a_limit_in_seconds_leaves_room_for_passes_that_are_late(path, tmp_path):
    base = compile_plan(request(path, 1.0)).pricing.base["latency"]
    late = tmp_path / "late.json"
    save_device(late, measured(late=0.25))
    plan = compile_plan(request(late, f"latency={base}s")).plan
    assert 0.7 * base < plan.cost["latency"]["plan"] <= base / 1.25
    # A share of the base model is no deadline.
    assert compile_plan(request(late, {"latency": 1.0})).plan.is_dense


def test_a_model_that_was_measured_itself_has_seconds_and_a_margin_of_its_own(path):
    compiled = compile_plan(request(path, 1.0))
    base = compiled.pricing.base["latency"]
    device, terms = measured(), {**ALONE, "pass": 2e-3, "operator": 1e-6, "products": 3.0}
    own = {"prompt": Passes(terms, late=0.25), "token": Passes(terms)}
    fingerprint = str(compiled.graph.properties["fingerprint"])
    known = replace(device.measured["float32"], models={fingerprint: own})
    save_device(path, replace(device, measured={"float32": known}))
    now = compile_plan(request(path, 1.0)).pricing.base["latency"]
    assert now > 1.5 * base
    compiled = compile_plan(request(path, f"latency={now}s"))
    assert not any("--model" in note for note in compiled.notes)
    plan = compiled.plan
    assert 0.7 * now < plan.cost["latency"]["plan"] <= now / 1.25


def test_a_plan_outlives_the_device_file_that_it_was_made_with(path, tmp_path):
    compiled = compile_plan(request(path, {"latency": 0.8}))
    plan_file = tmp_path / "plan.yaml"
    save_plan(compiled.plan, plan_file)
    path.unlink()
    check_figures(load_plan(plan_file), compiled.graph)
