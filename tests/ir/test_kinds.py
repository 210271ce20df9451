"""Every kind of operator, one row each: what it costs, by hand."""

from dataclasses import dataclass, field, replace

import pytest

from planner.ir.cost import price
from planner.ir.cost.device_table import Device
from planner.ir.cost.price import operator_flops, operator_parameters
from planner.ir.dims import Dim
from planner.ir.graph import Graph, Operator
from planner.ir.graph_text import parse_graph, print_graph
from planner.ir.kinds import KINDS, attended_keys, kind_of
from planner.ir.verify import verify

SIZES = {"batch": 2, "images": 3, "query": 5, "context": 11}
# One operation or byte a second, the other for nothing.
COMPUTE = Device("compute", 1e-12, 1e30, 1, "by hand")


@dataclass(frozen=True)
class Row:
    """An operator, and its figures at `SIZES`.

    Attributes:
        reads: shapes of its inputs.
        moved: elements of weights and inputs read, and of the output written.
        light: operations on the roofline, where there are no FLOPs.
    """

    shape: tuple
    reads: tuple = ()
    attributes: dict = field(default_factory=dict)
    flops: int = 0
    weights: int = 0
    moved: int = 0
    light: int = 0


def kv_elements(operator, sizes):
    return kind_of(operator).cached(operator, sizes)


def tokens(width):
    """Shape of activations, 10 rows at `SIZES`."""
    return ("batch", "query", width)


ROWS = {
    "input": Row(tokens(4)),
    "linear": Row(
        tokens(7),
        (tokens(4),),
        {"in": 4, "out": 7, "bias": 1},
        flops=2 * 10 * 4 * 7,
        weights=5 * 7,
        moved=5 * 7 + 10 * (4 + 7),
    ),
    "fused_linear": Row(
        tokens(7),
        (tokens(4),),
        {"in": 4, "out": 7, "bias": 0, "count": 2},
        flops=2 * 10 * 4 * 7,
        weights=4 * 7,
        moved=4 * 7 + 10 * (4 + 7),
    ),
    "norm_linear": Row(
        tokens(7),
        (tokens(4),),
        {"in": 4, "out": 7, "bias": 0, "count": 1, "norm_bias": 1},
        flops=2 * 10 * 4 * 7,
        weights=4 * 7 + 2 * 4,
        moved=4 * 7 + 2 * 4 + 10 * (4 + 7),
    ),
    "experts": Row(
        ("batch", "2*query", 6),
        (tokens(4),),
        {"in": 4, "out": 6, "experts": 8},
        flops=2 * 20 * 4 * 6,
        weights=8 * 4 * 6,
        moved=8 * 4 * 6 + 20 * (4 + 6),
    ),
    "matmul": Row(
        ("batch", "query", "query"),
        (tokens(8), tokens(8)),
        {"inner": 8},
        flops=2 * 2 * 5 * 5 * 8,
        moved=2 * 10 * 8 + 2 * 5 * 5,
    ),
    "conv": Row(
        ("images", 6, 4, 4),
        (("images", 3, 20, 20),),
        {"in": 3, "out": 6, "kernel": 25, "bias": 1},
        flops=2 * 3 * 6 * 16 * 3 * 25,
        weights=6 * (3 * 25 + 1),
        moved=6 * (3 * 25 + 1) + 3 * 3 * 400 + 3 * 6 * 16,
    ),
    "attention": Row(
        ("batch", 4, "query", 8),
        (("batch", 4, "query", 16), ("batch", 2, "query", 16), tokens(16)),
        {"heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 8, "keys": Dim.of("context")},
        flops=2 * 2 * 4 * 5 * 11 * (16 + 8),
        moved=2 * (4 * 5 * 16 + 2 * 11 * (16 + 8) + 4 * 5 * 8),
    ),
    "scan": Row(
        tokens(6),
        (tokens(6), tokens(2)),
        {"flops_per_row": 13, "chunk": 4, "flops": 5},
        flops=10 * 13,
        moved=10 * (6 + 2 + 6),
    ),
    "select_tokens": Row(
        tokens(6),
        (("batch", 8, 6),),
        {"keep": 1, "of": 4, "before": 8, "score_width": 32},
        flops=2 * 2 * 8 * 32,
        moved=2 * 8 * 32 + 2 * 10 * 6,
    ),
    "norm": Row(
        tokens(4), (tokens(4),), {"width": 4, "bias": 1}, weights=8, moved=8 + 80, light=7 * 40
    ),
    "softmax": Row(tokens(4), (tokens(4),), moved=80, light=5 * 40),
    # Of a wider input only a slice is read.
    "rotary": Row(tokens(4), (tokens(12),), moved=80, light=3 * 40),
    "activation": Row(tokens(4), (tokens(8),), {"function": "silu"}, moved=80, light=4 * 40),
    "elementwise": Row(tokens(4), (tokens(4),), {"function": "tanh"}, moved=80, light=40),
    "add": Row(tokens(4), (tokens(4), tokens(4)), moved=120, light=40),
    "multiply": Row(tokens(4), (tokens(4), (4,)), moved=84, light=40),
    # All that is reduced is read.
    "reduce": Row(("batch", "query", 1), (tokens(4),), {"function": "mean"}, moved=50, light=10),
    "embedding": Row(tokens(4), ((10,),), {"entries": 9, "width": 4}, weights=36, moved=80),
    "gather": Row(("batch", 1, 4), (tokens(4),), moved=16),
}


def graph_of(kind):
    """An operator of the kind, after what it reads."""
    row = ROWS[kind]
    inputs = [
        Operator(f"in{i}", "input", shape=tuple(map(Dim.of, shape)))
        for i, shape in enumerate(row.reads)
    ]
    operator = Operator("it", kind, tuple(o.name for o in inputs), tuple(map(Dim.of, row.shape)))
    properties = dict.fromkeys(("decoder_layers", "hidden_size", "image_tokens"), 0)
    operators = (*inputs, operator.having(**row.attributes))
    return Graph("one", operators, (), {**properties, "dtype_bytes": 2})


def operator_of(kind):
    return graph_of(kind).by_name["it"]


def test_every_kind_has_a_row():
    assert set(ROWS) == set(KINDS)
    assert all(record.computes for record in KINDS.values())


@pytest.mark.parametrize("kind", ROWS)
def test_what_a_kind_costs(kind):
    row, graph, operator = ROWS[kind], graph_of(kind), operator_of(kind)
    assert operator_flops(operator, SIZES) == row.flops
    assert operator_parameters(operator) == row.weights
    cost = price(operator, graph, SIZES, COMPUTE)
    assert cost.flops == row.flops
    assert cost.bytes == 2 * row.moved
    assert cost.seconds == pytest.approx(row.flops or row.light, abs=1e-9)


@pytest.mark.parametrize("kind", ROWS)
def test_a_kind_is_verified_and_reads_back(kind):
    graph = graph_of(kind)
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph


def test_a_stage_that_drops_nothing_scores_nothing():
    operator = operator_of("select_tokens")
    assert operator_flops(operator.having(before=Dim.of("query")), SIZES) == 0


def test_zeros_stay_zeros_but_for_a_bias():
    keeps = {kind for kind in KINDS if KINDS[kind].keeps_zero(operator_of(kind))}
    assert keeps == {"fused_linear", "multiply", "gather"}
    for kind, bias in (("linear", "bias"), ("norm", "bias"), ("norm_linear", "norm_bias")):
        assert KINDS[kind].keeps_zero(operator_of(kind).having(**{bias: 0}))


@pytest.mark.parametrize(
    ("query", "context", "keys", "cached"),
    [
        (9, 9, 9, 3),  # a whole prompt meets all of itself
        (1, 3, 3, 3),
        (1, 4, 4, 3),  # as many as the window
        (1, 90, 4, 3),
        (2, 90, 5, 3),
    ],
)
def test_a_window_of_four_tokens(query, context, keys, cached):
    operator = operator_of("attention").having(window=4)
    sizes = {"batch": 1, "query": query, "context": context}
    assert attended_keys(operator, sizes) == keys
    assert operator_flops(operator, sizes) == 2 * 4 * query * keys * (16 + 8)
    assert kv_elements(operator, sizes) == cached * 2 * (16 + 8)


def test_only_a_decoder_caches_keys():
    operator = operator_of("attention")
    assert kv_elements(operator, SIZES) == 2 * 11 * 2 * (16 + 8)
    assert kv_elements(replace(operator, part="vision"), SIZES) == 0
    assert kv_elements(operator.having(keys=11), SIZES) == 0
