import ast
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.ir.errors import InputError
from planner.ir.graph import Graph, Site
from planner.ir.intervals import numbers_of
from planner.plan import (
    Kept,
    Plan,
    TokenStage,
    dump_plan,
    load_plan,
    save_plan,
)


@pytest.fixture
def plan():
    return Plan(
        model="m",
        fingerprint="0123456789abcdef",
        layers=4,
        layers_off=(2,),
        heads={0: (0, 1, 3), 1: ()},
        mlp={3: (0, 2)},
        mlp_switches={3: 4},
        tokens=(TokenStage(2, 288, 576, "fastv"),),
        budget={"flops": "0.65 of base"},
        cost={"flops": {"plan": 65, "base": 100.0, "fraction": 0.65}},
        utilisation={"flops": 1.0},
        solver={"status": "optimal", "gap": 0.0},
        provenance={"planner": "0.1.0"},
    )


@pytest.fixture
def graph():
    sites = tuple(
        Site(f"{kind}.{layer}", kind, layer, "m", lanes, switches)
        for layer in range(4)
        for kind, lanes, switches in (("layer", 1, 1), ("heads", 4, 4), ("mlp", 64, 4))
    )
    properties = {"decoder_layers": 4, "fingerprint": "0123456789abcdef", "dtype_bytes": 2}
    return Graph("m", (), sites, properties)


def test_what_a_plan_keeps_of_a_site(plan, graph):
    def kept(name):
        return plan.kept(graph.sites_by_name[name])

    assert kept("heads.0") == Kept((0, 1, 3), 4, ((0, 2), (3, 4)))
    assert kept("heads.0").count == 3
    assert kept("heads.1").nothing
    assert kept("mlp.0").everything
    assert kept("mlp.3") == Kept((0, 2), 4, ((0, 16), (32, 48)))
    assert kept("layer.0") == Kept((0,), 1, ((0, 1),))
    # Whatever is in a layer that is off is off.
    assert all(kept(f"{kind}.2").nothing for kind in ("layer", "heads", "mlp"))


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_lanes_kept_are_those_of_the_switches(lanes, switches, data):
    site = Site("mlp.0", "mlp", 0, "m", lanes, min(lanes, switches))
    some = tuple(sorted(data.draw(st.sets(st.integers(0, site.switches - 1)))))
    # The plan divides the site as it was made for, whatever the graph at hand says.
    kept = Plan("m", "f", 1).keeping([(site, some)]).kept(replace(site, switches=1 + lanes // 2))
    owners = [u for u in range(site.switches) for _ in range(*site.bounds[u : u + 2])]
    expected = [lane for lane, owner in enumerate(owners) if owner in some]
    assert numbers_of(kept.lanes) == expected
    assert all(stop < start for (_, stop), (start, _) in pairwise(kept.lanes))
    assert kept.count == len(expected)
    assert kept.everything == (len(some) == site.switches)
    if not kept.everything:
        assert (kept.switches, kept.of) == (some, site.switches)


def test_keeping_narrows_what_runs_and_is_less_than_all(plan, graph):
    every = {site.name: range(site.switches) for site in graph.sites if site.kind != "layer"}
    sites = graph.sites_by_name
    again = plan.keeping((sites[name], plan.kept(sites[name]).switches) for name in every)
    assert again == plan
    assert plan.keeping((sites[name], switches) for name, switches in every.items()) == replace(
        plan, heads={}, mlp={}, mlp_switches={}
    )


def test_a_plan_round_trips_and_is_deterministic(plan, tmp_path):
    save_plan(plan, tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml") == plan
    assert dump_plan(plan) == dump_plan(load_plan(tmp_path / "plan.yaml"))


def test_a_truncated_plan_is_refused_wherever_it_is_cut(plan, tmp_path):
    text = dump_plan(plan)
    path = tmp_path / "plan.yaml"
    for length in range(0, len(text) - 1, 7):
        path.write_text(text[:length])
        with pytest.raises(InputError) as error:
            load_plan(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("keep: 288", "keep: 144", "changed after it was written"),
        ("layers: 4", "layers: four", "broken at layers"),
        ("layers: 4", "layers: 4\nextra: 1", "broken at extra"),
        ("planner_plan: 1", "planner_plan: 99", "format 99"),
        ("planner_plan: 1", "other: 1", "not a plan"),
        ("0-1,3", "3,0-1", "changed after"),
    ],
)
def test_hand_edited_plans_are_refused(plan, tmp_path, old, new, expected):
    path = tmp_path / "plan.yaml"
    text = dump_plan(plan)
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=expected):
        load_plan(path)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(InputError, match="no plan"):
        load_plan(tmp_path / "absent.yaml")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_plan(tmp_path / "b")


def test_a_plan_fits_its_graph_only(plan, graph):
    plan.check(graph)
    cases = [
        (replace(plan, fingerprint="other"), "was made for"),
        (replace(plan, heads={0: (0, 9)}), "heads of layer 0"),
        (replace(plan, heads={7: (0,)}), "does not have"),
        (replace(plan, mlp={3: (0, 7)}), "MLP groups of layer 3"),
        (replace(plan, mlp_switches={3: 0}), "divides"),
        (replace(plan, layers_off=(4,)), "layers that are off"),
        (replace(plan, tokens=(TokenStage(9, 1, 2),)), "token stages"),
    ]
    for broken, expected in cases:
        with pytest.raises(InputError, match=expected):
            broken.check(graph)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_nothing_is_left_in_a_folder_that_cannot_be_written(plan, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot write"):
        save_plan(plan, tmp_path / "plan.yaml")


def test_a_failed_write_keeps_the_old_file(plan, tmp_path, monkeypatch):
    path = tmp_path / "plan.yaml"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        save_plan(plan, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


STORED = ("heads", "mlp", "mlp_switches")
ROOT = Path(__file__).parents[2]


def reads_of_stored_switches(code):
    """Lines that take what a plan keeps from its fields rather than from `Plan.kept`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = ast.unparse(node.value).rpartition(".")[2]
            of_plan = "plan" in owner and owner != "planner"
            if node.attr == "mlp_switches" or (node.attr in STORED and of_plan):
                yield node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            of, name = map(ast.unparse, node.args[:2])
            if "plan" in of and name in ("kind", "site.kind", *map(repr, STORED)):
                yield node.lineno


def test_plans_are_read_by_one_method():
    code = "x = plan.heads\ny = self.plan.mlp[1]\nz = one.mlp_switches\ngetattr(plan, site.kind)\n"
    assert sorted(reads_of_stored_switches(code)) == [1, 2, 3, 4]
    assert not [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("benchmarks", "examples", "ir", "kernels", "models", "planner", "training")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "planner/plan.py"
        for line in reads_of_stored_switches(path.read_text(encoding="utf-8"))
    ]
