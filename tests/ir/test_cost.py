"""Prices of operators: bytes by hand, the roofline, totals, devices and workloads."""

from dataclasses import fields

import pytest

from planner.ir.cost import Cost, Workload, price, total
from planner.ir.cost.device_table import Device, device, devices
from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Operator

# One operation and one byte a second: seconds are the larger of the two counts.
UNIT = Device("unit", 1e-12, 1e-9, 1, "by hand")


def operator(name, kind, shape, inputs=(), part="decoder", **attributes):
    attributes = {key.rstrip("_"): value for key, value in attributes.items()}
    shape = tuple(map(Dim.of, shape))
    return Operator(name, kind, tuple(inputs), shape, part=part).having(**attributes)


def attention(name, inputs, **attributes):
    facts = {"heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 8, "keys": Dim.of("context")}
    return operator(name, "attention", ("batch", 4, "query", 8), inputs, **(facts | attributes))


OPERATORS = [
    operator("pixels", "input", ("images", 3, 8, 8), part="vision"),
    operator(
        "patches", "conv", ("images", 10, 2, 2), ["pixels"], "vision",
        in_=3, out=10, kernel=16, bias=1,
    ),
    operator("table", "embedding", ("batch", "query", 32), entries=100, width=32),
    operator("norm", "norm", ("batch", "query", 32), ["table"], width=32, bias=0),
    operator("qkv", "linear", ("batch", "query", 160), ["norm"], in_=32, out=160, bias=1),
    operator("rotary_q", "rotary", ("batch", 4, "query", 16), ["qkv"]),
    operator("rotary_k", "rotary", ("batch", 2, "query", 16), ["qkv"]),
    attention("attention", ["rotary_q", "rotary_k", "qkv"]),
    operator("o", "linear", ("batch", "query", 32), ["attention"], in_=32, out=32, bias=0),
    operator("add", "add", ("batch", "query", 32), ["table", "o"]),
    operator("last", "gather", ("batch", 1, 32), ["add"]),
    operator("lm_head", "linear", ("batch", 1, 100), ["last"], "head",
             in_=32, out=100, bias=0, tied=1),
]  # fmt: skip
GRAPH = Graph("tiny", tuple(OPERATORS), (), {"dtype_bytes": 2, "decoder_layers": 1})
PREFILL = {"batch": 3, "images": 3, "query": 7, "context": 7}
DECODE = {"batch": 3, "images": 0, "query": 1, "context": 12}


def moved(name, sizes):
    """Elements read and written."""
    cost = price(GRAPH.by_name[name], GRAPH, sizes)
    assert cost.bytes % 2 == 0
    return cost.bytes // 2


@pytest.mark.parametrize(
    ("name", "weights", "read", "written"),
    [
        ("pixels", 0, 0, 0),
        ("patches", 10 * 49, 3 * 192, 3 * 40),
        ("table", 0, 21 * 32, 21 * 32),
        ("norm", 32, 21 * 32, 21 * 32),
        ("qkv", 33 * 160, 21 * 32, 21 * 160),
        # Only the part of the fused projection that is rotated.
        ("rotary_q", 0, 21 * 64, 21 * 64),
        ("rotary_k", 0, 21 * 32, 21 * 32),
        # Keys and values once for each of 2 KV heads, not for each of 4 heads.
        ("attention", 0, 21 * 4 * 16 + 21 * 2 * 24, 21 * 4 * 8),
        ("o", 32 * 32, 21 * 32, 21 * 32),
        ("add", 0, 2 * 21 * 32, 21 * 32),
        ("last", 0, 3 * 32, 3 * 32),
        ("lm_head", 32 * 100, 3 * 32, 3 * 100),
    ],
)
def test_bytes_of_a_prefill(name, weights, read, written):
    assert moved(name, PREFILL) == weights + read + written


def test_a_decode_step_reads_the_cache_and_every_weight_once():
    assert moved("attention", DECODE) == 3 * (4 * 16 + 12 * 2 * 24 + 4 * 8)
    assert moved("qkv", DECODE) == 33 * 160 + 3 * (32 + 160)
    assert price(GRAPH.by_name["attention"], GRAPH, DECODE).kv_bytes == 2 * 3 * 12 * 2 * 24


def test_what_does_not_run_costs_nothing_but_is_still_a_parameter():
    assert price(GRAPH.by_name["patches"], GRAPH, DECODE, UNIT) == Cost(parameters=490)


def test_a_tied_head_reads_its_weights_but_adds_no_parameters():
    assert price(GRAPH.by_name["lm_head"], GRAPH, PREFILL).parameters == 0


def test_few_rows_read_few_experts():
    experts = operator(
        "experts", "experts", ("batch", "2*query", 6), ["norm"], in_=32, out=6, experts=8
    )
    graph = GRAPH.replacing([*OPERATORS, experts])
    one = {"batch": 1, "images": 0, "query": 1, "context": 1}
    read = {1: 2, 3: 6, 4: 8, 50: 8}
    for batch, used in read.items():
        cost = price(experts, graph, one | {"batch": batch})
        assert cost.bytes == 2 * (used * 32 * 6 + 2 * batch * (32 + 6))
        assert cost.parameters == 8 * 32 * 6


def test_a_token_stage_reads_the_keys_it_scores_by_and_the_tokens_it_keeps():
    stage = operator(
        "tokens.2", "select_tokens", ("batch", "query.2", 32), ["add"],
        keep=2, of=5, before=Dim.of("query"), score_width=64,
    )  # fmt: skip
    graph = GRAPH.replacing([*OPERATORS, stage])
    cost = price(stage, graph, PREFILL | {"query.2": 4, "context.2": 4}, UNIT)
    assert (cost.flops, cost.bytes) == (2 * 3 * 7 * 64, 2 * (3 * 7 * 64 + 2 * 3 * 4 * 32))
    for sizes in (PREFILL | {"query.2": 7}, DECODE | {"query.2": 1}):
        assert price(stage, graph, sizes, UNIT) == Cost()


def test_the_roofline_takes_the_larger_term_and_names_it():
    linear = GRAPH.by_name["qkv"]
    cost = price(linear, GRAPH, PREFILL, UNIT)
    assert (cost.bound, cost.seconds) == ("compute", pytest.approx(2 * 21 * 32 * 160))
    slow_memory = Device("slow memory", 1e-12, 1e-12, 1, "by hand")
    cost = price(linear, GRAPH, PREFILL, slow_memory)
    assert (cost.bound, cost.seconds) == ("memory", pytest.approx(1e3 * cost.bytes))
    norm = price(GRAPH.by_name["norm"], GRAPH, PREFILL, UNIT)
    assert norm.flops == 0
    assert norm.seconds == pytest.approx(max(7 * 21 * 32, norm.bytes))
    assert price(linear, GRAPH, PREFILL).seconds == 0
    assert price(linear, GRAPH, PREFILL).bound == "-"


def test_larger_batches_move_weights_once():
    for name in GRAPH.by_name:
        one, four = (
            price(GRAPH.by_name[name], GRAPH, PREFILL | {"batch": b, "images": b}) for b in (1, 4)
        )
        weights = 0 if name == "table" else 2 * (3200 if name == "lm_head" else one.parameters)
        assert four.flops == 4 * one.flops
        assert four.bytes - weights == 4 * (one.bytes - weights)
        assert four.kv_bytes == 4 * one.kv_bytes


def test_total_sums_everything_and_names_what_takes_longest():
    costs = [price(o, GRAPH, PREFILL, UNIT) for o in OPERATORS]
    whole = total(costs)
    for field in fields(Cost):
        if field.name != "bound":
            assert getattr(whole, field.name) == pytest.approx(
                sum(getattr(cost, field.name) for cost in costs)
            )
    share = {b: sum(c.seconds for c in costs if c.bound == b) for b in ("compute", "memory")}
    assert whole.bound == max(share, key=share.get)
    assert total([]) == Cost()


def test_devices_are_consistent():
    assert {"v100", "a6000", "a40", "a100-40g", "a100-80g", "h100-sxm", "h100-pcie", "l40",
            "h200"} <= set(devices())  # fmt: skip
    for name, known in devices().items():
        assert known.name == name
        assert known.source
        # Operations for each byte read: between those of a V100 and an H100 PCIe, with room.
        assert 100 < known.operations_per_second / known.bytes_per_second < 500
        assert 8 <= known.memory_gb <= 300
    with pytest.raises(InputError, match="unknown device 'abacus': choose from v100, "):
        device("abacus")


def test_workload_sizes():
    load = Workload(576, 64, 10, batch=2, image_tokens_per_run=576)
    beside = {"encoding": 0, "encoded": 0}
    assert load.prefill() == {"batch": 2, "images": 2, "query": 640, "context": 640} | beside
    assert load.decode(3) == {"batch": 2, "images": 0, "query": 1, "context": 643} | beside
    kept = {2: 100, 16: 0}
    assert load.prefill(kept)["query.2"] == load.prefill(kept)["context.2"] == 164
    assert load.prefill(kept)["query.16"] == 64
    assert load.decode(3, kept)["context.2"] == 167
    assert load.decode(3, kept)["query.2"] == 1
    # Four tiles and a thumbnail, and a part of a run is a run.
    assert Workload(5 * 576, image_tokens_per_run=576).images == 5
    assert Workload(577, image_tokens_per_run=576).images == 2
    assert Workload(0, 5).images == 0


def test_an_encoder_s_output_is_computed_once_and_attended_to_by_every_token():
    graph = Graph("reading", (), (), {"image_tokens": 0, "encoded_tokens": 32})
    load = Workload.default(graph, batch=3)
    assert (load.image_tokens, load.encoded_tokens, load.images) == (0, 32, 3)
    assert load.prefill()["encoding"] == load.prefill()["encoded"] == 32
    assert (load.decode(1)["encoding"], load.decode(1)["encoded"]) == (0, 32)
    assert Workload.stated(graph, load.facts) == load
    # An encoder of words has no size of its own.
    words = Graph("writing", (), (), {"image_tokens": 0, "encoded_tokens": 0})
    assert Workload.default(words, text_tokens=9).encoded_tokens == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_tokens": -1}, "image-tokens must be at least 0, not -1"),
        ({"image_tokens": 5, "batch": 0}, "batch must be at least 1, not 0"),
        ({"image_tokens": 5, "new_tokens": -3}, "new-tokens must be at least 0"),
        ({"image_tokens": 0, "text_tokens": 0}, "the prompt has no tokens"),
    ],
)
def test_impossible_workloads(arguments, message):
    with pytest.raises(InputError, match=message):
        Workload(**arguments)


def test_the_default_workload_is_one_image():
    graph = Graph("seeing", (), (), {"image_tokens": 256})
    assert Workload.default(graph) == Workload(256, 64, 64, 1, 256)
    assert Workload.default(graph, image_tokens=512, batch=3).images == 6
    assert Workload.default(Graph("blind", (), (), {})).images == 0
