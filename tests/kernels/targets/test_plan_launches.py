"""What plans launch, read off the graphs of the families."""

from functools import cache

import pytest
import torch
from architectures import PECULIAR
from families import FAMILIES

from planner.ir.cost import Workload
from planner.ir.graph_text import parse_graph, print_graph
from planner.ir.intervals import intervals_of
from planner.ir.lowering import lower_config, lower_model
from planner.kernels.mlp_blocks import NotFusable, mlp_block
from planner.kernels.targets.keys import key_of
from planner.kernels.targets.plan_launches import calls_of, kept_features, launches_of
from planner.kernels.triton.tiles import TARGETS
from planner.models.running.bindings import bind
from planner.plan import Plan, TokenStage

TARGET = TARGETS["sm_80"]


@cache
def graph_of(name):
    return lower_model(FAMILIES[name]().model, name)


def plan_for(graph, **switches):
    return Plan(graph.name, str(graph.properties["fingerprint"]), graph.layers, **switches)


@pytest.fixture(scope="module")
def llava():
    return graph_of("llava")


def test_ops_of_a_plan(llava):
    plan = plan_for(
        llava,
        layers_off=(1,),
        heads={0: (1,), 3: (1,)},
        mlp={0: (0, 2), 2: ()},
        mlp_switches={0: 4, 2: 4},
        tokens=(TokenStage(2, 5, 16, "fastv"),),
    )
    calls, unfused = calls_of(llava, plan, Workload(16, 8, 1, 3), torch.float32)
    assert unfused == []
    found = {}
    for call in calls:
        key = (call.layer, call.phase, call.tokens, call.batch)
        found.setdefault(key, []).append(call.module.rpartition(".")[2])
    attention = ["q_proj", "k_proj", "v_proj", "self_attn", "self_attn", "o_proj"]
    assert found == {
        (0, "prefill", 24, 3): [*attention, "mlp"],
        (2, "prefill", 24, 3): ["tokens", "tokens"],
        (2, "prefill", 13, 3): attention,
        (3, "prefill", 13, 3): [*attention, "mlp"],
        (0, "decode", 1, 3): [*attention, "mlp"],
        (2, "decode", 1, 3): attention,
        (3, "decode", 1, 3): [*attention, "mlp"],
    }


def test_survivors_are_the_plans(llava):
    plan = plan_for(llava, heads={0: (1,)}, mlp={0: (0, 2)}, mlp_switches={0: 4})
    calls, _ = calls_of(llava, plan, Workload(16, 8, 0), torch.float32)
    launches = {
        call.module.rpartition(".")[2] + launch.kernel.name.rpartition("_")[2]: launch.survivors
        for call, launch in launches_of([call for call in calls if call.layer == 0], TARGET)
    }
    runs = {name: survivors.kept_runs for name, survivors in launches.items()}
    assert runs == {
        "q_projrows": (((32, 64),),),
        "k_projrows": (((16, 32),),),
        "v_projrows": (((16, 32),),),
        "self_attnattend": (((0, 1),),),
        "o_projcolumns": (((32, 64),),),
        "mlprows": (((0, 24), (48, 72)),),
        "mlpcolumns": (((0, 24), (48, 72)),),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_that_the_executor_keeps(name):
    """Of every weight that a site narrows, fused, interleaved and shared ones among them."""
    graph, checked = graph_of(name), 0
    for layer in bind(FAMILIES[name]().model, graph):
        for bound in (layer.heads, layer.mlp):
            for linear in () if bound is None else bound.linears:
                for lanes in ((), ((0, 1),), ((0, bound.site.lanes),)):
                    want = intervals_of(
                        number for a, b in linear.runs(lanes) for number in range(a, b)
                    )
                    made = kept_features(bound.site, linear.binding, lanes, linear.features)
                    assert made == want
                    checked += 1
    assert checked or not graph.sites_of("heads") + graph.sites_of("mlp")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_launches_at_any_length(name):
    """Prompts of other lengths, in batches, find the kernels that were made for one."""
    graph = graph_of(name)
    plan = plan_for(graph)

    def keys(workload, any_plan):
        calls, _ = calls_of(graph, plan, workload, torch.bfloat16, any_plan=any_plan)
        return {key_of(launch, any_plan) for _, launch in launches_of(calls, TARGET)}

    for any_plan in (False, True):
        made = keys(Workload(0, 300, 2), any_plan)
        assert made
        assert keys(Workload(0, 270, 5), any_plan) == made


def test_blocks_that_are_not_fused_say_why(llava):
    assert {*blocks(llava)} == {("gate_proj", "up_proj", "down_proj", "silu")}
    assert {*blocks(graph_of("phi"))} == {("fc1", "fc2", "gelu_pytorch_tanh")}
    assert {*blocks(graph_of("gemma3"))} == {
        ("gate_proj", "up_proj", "down_proj", "gelu_pytorch_tanh")
    }
    for name, why in (
        ("phi3", "its gate and its up projection are rows of one weight"),
        ("opt", "its linears are the layer's own"),
    ):
        config, _ = PECULIAR[name]()
        assert {*blocks(lower_config(config, name).graph)} == {why}
    text = print_graph(llava)
    for before, after, why in (
        ("function=silu", "function=mish", "its activation, mish, is none of the kernels'"),
        ("= multiply(", "= add(", "it is not an activation, or one times a projection"),
    ):
        assert {*blocks(parse_graph(text.replace(before, after)))} == {why}


def blocks(graph):
    for site in graph.sites_of("mlp"):
        try:
            block = mlp_block(graph, site)
        except NotFusable as reason:
            yield str(reason)
        else:
            modules = (linear.module.rpartition(".")[2] for linear in block.linears)
            yield (*modules, block.activation)
