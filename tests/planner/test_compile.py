"""The main job on the real input: LLaVA-1.5-7B's config, no weights."""

import json
import subprocess
import sys

import numpy as np
import pytest

from planner.ir.cost import price, total
from planner.ir.errors import InputError
from planner.plan import dump_plan
from planner.planning.compiler import compile_plan, specialised
from planner.planning.request import Request
from planner.planning.switches import mlp_switches

BUDGETS = (0.5, 0.6, 0.65, 0.75, 0.85, 0.95, 1.0)


@pytest.fixture(scope="module")
def compiled():
    return {b: compile_plan(Request("llava-7b", budget=b)) for b in BUDGETS}


def test_utilisation_is_at_least_999_permille(compiled):
    for budget, result in compiled.items():
        used = result.plan.utilisation["flops"]
        assert 0.999 <= used <= 1.0, budget
        assert result.plan.solver["status"] == "optimal"


def test_the_specialised_graph_costs_what_the_plan_says(compiled):
    for result in compiled.values():
        graph = specialised(result.graph, result.plan)
        load = result.pricing.workload
        sizes = load.prefill({s.layer: s.keep for s in result.plan.tokens})
        costs = total(price(o, graph, sizes, result.pricing.device) for o in graph)
        assert costs.flops == result.plan.cost["flops"]["plan"]
        end = load.decode(load.new_tokens, {s.layer: s.keep for s in result.plan.tokens})
        kv = sum(price(o, graph, end).kv_bytes for o in graph)
        assert kv == result.plan.cost["kv"]["plan"]


def test_budget_one_is_the_base_model(compiled):
    assert compiled[1.0].plan.is_dense
    assert compiled[1.0].plan.cost["flops"]["fraction"] == 1.0


def test_plans_are_deterministic(compiled):
    again = compile_plan(Request("llava-7b", budget=0.65))
    assert dump_plan(again.plan) == dump_plan(compiled[0.65].plan)


def test_more_budget_is_never_worse(compiled):
    worth = [compiled[b].plan.solver["utility"] for b in BUDGETS]
    assert worth == sorted(worth)


@pytest.mark.parametrize(
    ("budget", "layers"),
    [(0.5, 16), (0.6, 19), (0.65, 20), (0.75, 24), (0.85, 27), (0.95, 30), (1, 32)],
)
def test_adallava_l_runs_exactly_the_papers_layers(budget, layers):
    result = compile_plan(Request("llava-7b", budget=budget, switches="adallava-l"))
    assert sum(result.solution.choice.layers_on) == layers
    assert not any(off < 16 for off in result.plan.layers_off)
    assert result.pricing.scope == "llm"


@pytest.mark.parametrize("budget", [0.5, 0.6, 0.85, 1])
def test_adallava_h_counts_units_of_heads_and_groups(budget):
    result = compile_plan(Request("llava-7b", budget=budget, switches="adallava-h"))
    plan, graph = result.plan, result.graph
    heads = sum(len(plan.kept(site).switches) for site in graph.sites_of("heads"))
    groups = sum(len(plan.kept(site).switches) for site in graph.sites_of("mlp"))
    assert heads == groups == int(128 * budget) * 8
    assert all(plan.kept(site).everything for site in graph.sites_of("heads")[:16])
    assert result.graph.sites_by_name["mlp.0"].bounds == tuple(range(0, 11009, 344))


def test_counted_switches_begin_and_come_in_units_as_told():
    request = Request("llava-7b", budget=0.75, switches="adallava-h:unit=16,first=8")
    plan, graph = (result := compile_plan(request)).plan, result.graph
    kept = [len(plan.kept(site).switches) for site in graph.sites_of("heads")]
    assert kept[:8] == [32] * 8
    assert {count % 16 for count in kept} == {0}
    assert sum(kept) == int(64 * 0.75) * 16
    with pytest.raises(InputError, match=r"16 of 32: adallava-l cannot keep to less than 0\.5$"):
        compile_plan(Request("llava-7b", budget=0.3, switches="adallava-l"))


def test_several_limits_hold_together():
    budget = ["0.65", "kv=200MiB", "latency=60ms", "memory=10GiB"]
    result = compile_plan(Request("llava-7b", budget=budget, device="v100"))
    cost = {metric: values["plan"] for metric, values in result.plan.cost.items()}
    assert cost["kv"] <= 200 * 2**20
    assert cost["latency"] <= 0.060
    assert cost["memory"] <= 10 * 2**30
    assert result.plan.cost["flops"]["fraction"] <= 0.65
    assert max(result.plan.utilisation.values()) > 0.99
    assert result.solution.gap <= 1e-4


@pytest.mark.parametrize("axes", ["tokens", "layers", "heads", "mlp", "tokens,layers", "heads,mlp"])
def test_every_axis_alone_stays_within_its_budget(axes):
    result = compile_plan(Request("llava-7b", budget=0.75, switches=axes))
    assert result.plan.cost["flops"]["fraction"] <= 0.75
    plan = result.plan
    used = {
        "tokens": bool(plan.tokens), "layers": bool(plan.layers_off),
        "heads": bool(plan.heads), "mlp": bool(plan.mlp),
    }  # fmt: skip
    assert all(axis in axes.split(",") for axis, use in used.items() if use)


def test_infeasible_limits_name_the_smallest_feasible():
    with pytest.raises(InputError, match="smallest possible is"):
        compile_plan(Request("llava-7b", budget=0.01))


def test_a_latency_budget_needs_a_device():
    with pytest.raises(InputError, match="--device"):
        compile_plan(Request("llava-7b", budget="latency=49ms"))


def test_measured_utilities_are_used(tmp_path, compiled):
    graph = compiled[0.65].graph
    rng = np.random.default_rng(0)
    arrays = {s.name: rng.gamma(1.0, size=s.switches) for s in graph.sites}
    arrays["tokens"] = np.float64(5.0)
    np.savez(tmp_path / "u.npz", **arrays)
    result = compile_plan(Request("llava-7b", budget=0.65, utilities=str(tmp_path / "u.npz")))
    assert result.plan.provenance["utilities"] == "u.npz"
    kept = result.plan.kept(result.graph.sites_by_name["heads.5"]).switches
    values = arrays["heads.5"]
    dropped = [i for i in range(32) if i not in kept]
    assert not dropped or min(values[list(kept)]) >= max(values[dropped])


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "not a utilities file"), (b"PK\x03\x04 cut", "not a utilities file")],
)
def test_broken_utilities(tmp_path, content, expected):
    (tmp_path / "u.npz").write_bytes(content)
    with pytest.raises(InputError, match=expected):
        compile_plan(Request("llava-7b", utilities=str(tmp_path / "u.npz")))


@pytest.mark.parametrize(
    ("width", "heads", "groups"),
    [
        (11008, 32, 43),
        (13824, 40, 36),
        (10240, 32, 40),
        (2752, 16, 43),
        (384, 8, 3),
        (320, 8, 8),
        (100, 8, 8),
        (4, 8, 4),
    ],
)
def test_mlp_groups_fill_tiles_where_they_can(width, heads, groups):
    assert mlp_switches(width, heads) == groups


@pytest.mark.parametrize(
    "options", ["", "--tokens fastv:k=2,r=0.5 --kv h2o", "--tokens trim:max=0.2"]
)
def test_a_cached_compile_does_not_import_torch(tmp_path, options):
    compile_plan(Request("llava-7b"))
    code = (
        "import sys, json; from planner.cli import execute as run; "
        f"c = run(['compile', '--model', 'llava-7b', '-o', {str(tmp_path)!r}, '-q', "
        f"*{options.split()!r}]); "
        "print(json.dumps([c, 'torch' in sys.modules, 'transformers' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0, False, False]
