"""In which order kept lanes lie, and that memory used by one plan after the other holds each."""

from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from families import TEXT, cached, randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import plan_of, plans
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from planner.ir.graph import Binding, Block, Site
from planner.ir.intervals import intervals_of
from planner.ir.lowering import lower_model
from planner.models.running.bindings import bind_site
from planner.models.running.executor import Executor
from planner.models.running.lane_order import moves, order
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.narrowed_linear import SliceStore

LANES = 12
some_lanes = st.sets(st.integers(0, LANES - 1), min_size=1).map(lambda s: intervals_of(sorted(s)))


def numbers(lanes):
    return list(chain.from_iterable(range(start, stop) for start, stop in lanes))


@given(lanes=some_lanes, unit=st.integers(1, 3))
def test_an_order_holds_the_kept_lanes_at_home_where_they_can_be(lanes, unit):
    slots = order(lanes, 1).tolist()
    assert sorted(slots) == numbers(lanes)
    if len(lanes) > 1:
        assert all(slots[lane] == lane for lane in slots if lane < len(slots))
    # Whole units of lanes move together.
    wide = tuple((start * unit, stop * unit) for start, stop in lanes)
    by_unit = [lane * unit + rest for lane in slots for rest in range(unit)]
    assert order(wide, 1).tolist() == by_unit
    assert order(wide, unit).tolist() == slots


@given(lanes=some_lanes, held=some_lanes)
def test_moves_turn_one_order_into_another_and_copy_what_differs(lanes, held):
    before, after = order(held, 1), order(lanes, 1)
    memory = np.full(LANES, -1)
    memory[: len(before)] = before
    copied = 0
    for slot, lane, count in moves(lanes, held):
        memory[slot : slot + count] = range(lane, lane + count)
        copied += count
    assert memory[: len(after)].tolist() == after.tolist()
    shared = min(len(before), len(after))
    assert copied == len(after) - int((before[:shared] == after[:shared]).sum())
    assert not moves(lanes, lanes)


def test_random_plans_share_places():
    """The shares that the module's docstring gives."""
    for kept, share in ((8, 0.3), (14, 0.75)):
        rng = np.random.default_rng(0)
        lanes = [sorted(rng.choice(16, kept, replace=False).tolist()) for _ in range(400)]
        drawn = [intervals_of(numbers) for numbers in lanes]
        held = [1 - sum(n for _, _, n in moves(b, a)) / kept for a, b in pairwise(drawn)]
        assert np.mean(held) > share


def block(offset, stride, width=None):
    return Block(offset, stride, width or stride)


# How features of a linear belong to its 12 lanes: axis, features, blocks.
LAYOUTS = {
    "rows": ("out", 24, (block(0, 2),)),
    "columns": ("in", 24, (block(0, 2),)),
    "stacked": ("out", 60, (block(0, 3), block(36, 1), block(48, 1))),
    "in turn": ("out", 60, (block(0, 5, 3), block(3, 5, 1), block(4, 5, 1))),
    "shared": ("out", 27, (block(1, 2),)),
    "columns, shared": ("in", 26, (block(0, 2),)),
}


def bound(layout, transposed, generator):
    """One linear of that layout."""
    axis, features, blocks = LAYOUTS[layout]
    shape = (features, 10) if axis == "out" else (10, features)
    module = Conv1D(*shape) if transposed else nn.Linear(*reversed(shape))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model = nn.ModuleDict({"linear": module})
    site = Site("mlp.0", "mlp", 0, "linear", LANES, LANES, (Binding("linear", axis, blocks),))
    (linear,) = bind_site(model, site).linears
    return linear


def expected_features(linear, lanes):
    """Features in the order of a narrowed weight, feature by feature."""
    if linear.shared:
        return numbers(linear.runs(lanes))
    slots = order(lanes, 1).tolist() if lanes else []
    blocks = sorted(linear.binding.blocks, key=lambda block: block.offset)
    if any(block.width < block.stride for block in blocks):
        return [5 * lane + feature for lane in slots for feature in range(5)]
    return [
        b.offset + lane * b.stride + f for b in blocks for lane in slots for f in range(b.width)
    ]


@pytest.fixture
def poisoned():
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_memory_serves_one_plan_after_the_other(layout, transposed, data):
    generator = torch.Generator().manual_seed(0)
    linear = bound(layout, transposed, generator)
    assert bool(linear.records) == ("shared" not in layout)
    axis = linear.binding.axis
    bytes_ = data.draw(st.sampled_from([0, 600, 1 << 20]))
    store = SliceStore(bytes_)
    choice = data.draw(st.lists(st.just(()) | some_lanes, min_size=1, max_size=5))
    for _ in range(12):
        what = data.draw(st.sampled_from(["narrow", "narrow", "narrow", "write", "replace"]))
        if what != "narrow":
            new = torch.randn(linear.parameter.shape, generator=generator)
            with torch.no_grad():
                if what == "write":
                    linear.parameter.copy_(new)
                else:
                    linear.module.weight = nn.Parameter(new)
        store.begin()
        # Several groups hold theirs at the same time.
        held = []
        for _ in range(data.draw(st.integers(1, 3))):
            lanes = data.draw(st.sampled_from(choice))
            keep = data.draw(st.integers(0, 5)) == 0
            held.append((lanes, store.get(linear, lanes, keep)))
        for lanes, narrowed in held:
            features = expected_features(linear, lanes)
            weight, bias = linear.weight.detach(), linear.bias.detach()
            if axis == "out":
                weight, bias = weight[features], bias[features]
            else:
                weight = weight[:, features]
            given_features = torch.randn(2, 3, weight.shape[1], generator=generator)
            right = nn.functional.linear(given_features, weight, bias)
            torch.testing.assert_close(narrowed(given_features), right)
        assert store.bytes <= bytes_


def many_heads(model_type, **changes):
    """A tiny decoder with eight KV groups."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4}
    config = AutoConfig.for_model(model_type, **(TEXT | sizes | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = randomise(model.float(), 0)
    return model, lower_model(model, model_type)


@pytest.fixture(
    scope="module",
    params=[("qwen3", {}), ("phi3", {}), ("gpt_neox", {"rotary_pct": 0.5})],
    ids=lambda param: param[0],
)
def decoder(request):
    return many_heads(request.param[0], **request.param[1])


def close(actual, expected):
    return (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_walk_through_plans_equals_the_masked_model_at_every_step(decoder, data):
    model, graph = decoder
    ids = torch.arange(3, 25).view(2, 11)
    executor = Executor(model, graph)
    choice = [data.draw(plans(graph)) for _ in range(4)]
    some = st.sampled_from(choice)

    def masked(chosen):
        both = chosen if isinstance(chosen, list) else [chosen]
        with MaskedExecutor(model, graph).using(Gates.of(both, graph)):
            return model(ids).logits

    saved = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2}
    try:
        with torch.no_grad():
            for _ in range(5):
                if data.draw(st.integers(0, 3)) == 0:
                    model.get_parameter(data.draw(st.sampled_from(sorted(saved)))).mul_(-1)
                nested = [data.draw(some | st.tuples(some, some).map(list)) for _ in range(2)]
                outer, inner = map(masked, nested)
                with executor.using(nested[0]):
                    assert close(model(ids).logits, outer)
                    with executor.using(nested[1]):
                        assert close(model(ids).logits, inner)
                    assert close(model(ids).logits, outer)
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                model.get_parameter(name).copy_(value)


@torch.no_grad()
def test_a_plan_gives_the_same_bits_whatever_ran_before_it(decoder):
    model, graph = decoder
    ids = torch.arange(3, 14)[None]
    plan = plan_of(graph, heads={0: (1, 3, 4, 7), 2: (0, 6, 7)}, mlp={1: (0, 3, 5, 6), 3: (2, 6)})
    other = plan_of(graph, heads={0: (0, 2, 7), 2: (5, 7)}, mlp={1: (1, 2, 6), 3: (0, 3, 5)})
    with Executor(model, graph).using(plan):
        expected = model(ids).logits
    executor = Executor(model, graph)
    for chosen in (other, plan, other, plan):
        with executor.using(chosen):
            logits = model(ids).logits
        assert chosen is other or torch.equal(logits, expected)
    executor.attach(plan)
    assert torch.equal(model(ids).logits, expected)
    executor.detach()


@torch.no_grad()
def test_a_cache_outlives_a_change_of_plans_and_back(decoder):
    """Its keys lie in the order of the plan's heads, which must be the same the second time."""
    model, graph = decoder
    ids = torch.arange(3, 16)[None]
    plan = plan_of(graph, heads={0: (1, 3, 4, 7), 2: (0, 6, 7)})
    other = plan_of(graph, heads={0: (0, 2, 7), 2: (5, 7)})
    executor, cache = Executor(model, graph), DynamicCache()
    with executor.using(plan):
        expected = model(ids).logits
    executor.detach()
    pieces = []
    for part in ids.split([9, 2, 1, 1], 1):
        with executor.using(plan):
            pieces.append(model(part, **cached(model, cache)).logits)
        with executor.using(other):
            model(ids)
    assert close(torch.cat(pieces, 1), expected)
