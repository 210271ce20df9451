"""Blocks of the families, read off their graphs."""

import pytest
from families import FAMILIES

from planner.ir.cost import Workload
from planner.ir.lowering import lower_model
from planner.kernels.shapes import AttentionShape, MLPShape, NormShape, TokenShape, blocks_of
from planner.plan import Plan, TokenStage


def graph_of(name):
    return lower_model(FAMILIES[name]().model, name)


def plan_for(graph, **switches):
    return Plan(graph.name, str(graph.properties["fingerprint"]), graph.layers, **switches)


def shapes_of(name):
    graph = graph_of(name)
    blocks, left_out = blocks_of(graph, plan_for(graph), Workload(0, 20, 10, 1))
    assert left_out == []
    attention = {b.shape for b in blocks if isinstance(b.shape, AttentionShape)}
    mlp = {b.shape for b in blocks if isinstance(b.shape, MLPShape)}
    return attention, mlp


def test_phi():
    """Partial rotation, biases, LayerNorm, a plain MLP beside the attention."""
    attention, mlp = shapes_of("phi")
    layer, biases = NormShape("layer", True), ("query", "key", "value", "output")
    assert attention == {
        AttentionShape(64, 16, 1, 4, (0, 1, 2, 3), 8, biases, False, layer, None, True)
    }
    assert mlp == {
        MLPShape(64, 96, ((0, 96),), "gelu_pytorch_tanh", False, ("up", "down"), layer, True)
    }


def test_gemma3():
    """Head norms, two kinds of layers, and norms between a block and its residual."""
    attention, mlp = shapes_of("gemma3")
    assert {shape.window for shape in attention} == {24, None}
    (mlp,) = mlp
    assert (mlp.activation, mlp.residual) == ("gelu_pytorch_tanh", False)
    for shape in attention:
        assert (shape.head_norm, shape.residual, shape.norm) == (True, False, NormShape("rms"))


@pytest.fixture(scope="module")
def llava():
    return graph_of("llava")


def test_layers_of_like_plan_share_a_block(llava):
    plan = plan_for(
        llava,
        layers_off=(1,),
        heads={0: (1,), 3: (1,)},
        mlp={0: (0, 2), 2: ()},
        mlp_switches={0: 4, 2: 4},
        tokens=(TokenStage(2, 5, 16, "fastv"),),
    )
    blocks, _ = blocks_of(llava, plan, Workload(16, 8, 4, 3))
    found = {
        (type(b.shape), getattr(b.shape, "kept", None), b.phase, b.tokens): b.layers for b in blocks
    }
    whole, narrow = ((0, 96),), ((0, 24), (48, 72))
    assert found == {
        (TokenShape, 1, "prefill", 24): (2,),
        (AttentionShape, (1,), "prefill", 24): (0,),
        (AttentionShape, (1,), "prefill", 13): (3,),
        (AttentionShape, (1,), "decode", 1): (0, 3),
        (AttentionShape, (0, 1), "prefill", 13): (2,),
        (AttentionShape, (0, 1), "decode", 1): (2,),
        (MLPShape, narrow, "prefill", 24): (0,),
        (MLPShape, narrow, "decode", 1): (0,),
        (MLPShape, whole, "prefill", 13): (3,),
        (MLPShape, whole, "decode", 1): (3,),
    }
    assert {b.batch for b in blocks} == {3}
