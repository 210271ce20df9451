"""Products with kept features: what they hold, how they follow weights, and in which layout."""

import pytest
import torch
from families import TEXT, cached, randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onednn import by_onednn_everywhere
from plans import plan_of, plans
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from planner.ir.graph import Binding, Block, Site
from planner.ir.intervals import intervals_of, numbers_of
from planner.ir.lowering import lower_model
from planner.kernels.ops import kept_linear as products
from planner.kernels.ops.kept_linear import ONEDNN, kept_linear
from planner.models.running.bindings import bind_site
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.products import Copies, KeptProduct
from planner.models.running.skipping import obeying, session_on

needs_onednn = pytest.mark.skipif(not ONEDNN, reason="products are oneDNN's only beside MKL")

LANES = 12
some_lanes = st.sets(st.integers(0, LANES - 1), min_size=1).map(lambda s: intervals_of(sorted(s)))


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


def kept_features(linear, lanes):
    """Features of the kept lanes, and those of none, in the order of the weight."""
    owned = dict(lane_of(linear))
    kept = set(numbers_of(lanes))
    return [f for f in range(linear.features) if f not in owned or owned[f] in kept]


def lane_of(linear):
    """(feature, its lane), feature by feature."""
    for block in linear.binding.blocks:
        for lane in range(LANES):
            for feature in range(block.width):
                yield block.offset + lane * block.stride + feature, lane


def replace(linear, new):
    linear.module.weight = nn.Parameter(new)


def write(linear, new):
    with torch.no_grad():
        linear.parameter.copy_(new)


def write_data(linear, new):
    linear.parameter.data.copy_(new)


def exchange_data(linear, new):
    linear.parameter.data = new.clone()


def write_by_numpy(linear, new):
    linear.parameter.detach().numpy()[...] = new.numpy()


# Who writes to a weight; a frozen one is promised not to be written to past PyTorch.
SEEN, UNSEEN = [replace, write, exchange_data], [write_data, write_by_numpy]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_products_are_those_of_the_weight_as_it_is(layout, transposed, data):
    generator = torch.Generator().manual_seed(0)
    linear = bound(layout, transposed, generator)
    bytes_ = data.draw(st.sampled_from([0, 600, 1 << 20]))
    copies = Copies(bytes_) if bytes_ else None
    choice = data.draw(st.lists(st.just(()) | some_lanes, min_size=1, max_size=4))
    kept = [KeptProduct(linear, lanes, copies) for lanes in choice]
    for _ in range(12):
        if data.draw(st.booleans()):
            change = data.draw(st.sampled_from(SEEN if bytes_ else SEEN + UNSEEN))
            change(linear, torch.randn(linear.parameter.shape, generator=generator))
        for product in kept:
            product.refresh()
        for product in kept:
            features = kept_features(linear, product.lanes)
            weight, bias = linear.weight.detach(), linear.bias.detach()
            if linear.axis == "out":
                weight, bias = weight[features], bias[features]
            else:
                weight = weight[:, features]
            given_features = torch.randn(2, 3, weight.shape[1], generator=generator)
            right = F.linear(given_features, weight, bias)
            torch.testing.assert_close(product(given_features).detach(), right)
        assert copies is None or copies.bytes <= bytes_


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_reach_the_kept_features_of_the_stock_weight(layout, frozen):
    linear = bound(layout, False, torch.Generator().manual_seed(0))
    product = KeptProduct(linear, ((1, 3), (4, 5)), Copies(1 << 20) if frozen else None)
    for _ in range(2):
        product.refresh()
    features = kept_features(linear, product.lanes)
    rows = linear.axis == "out"
    given_features = torch.randn(3, linear.weight.shape[1] if rows else len(features))
    parameters = [linear.parameter, linear.bias]
    found = torch.autograd.grad(product(given_features).square().sum(), parameters)
    weight, bias = linear.weight, linear.bias
    weight, bias = (weight[features], bias[features]) if rows else (weight[:, features], bias)
    right = F.linear(given_features, weight, bias).square().sum()
    for mine, theirs in zip(found, torch.autograd.grad(right, parameters), strict=True):
        torch.testing.assert_close(mine, theirs)


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


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_walk_through_plans_equals_the_masked_model_at_every_step(decoder, data):
    model, graph = decoder
    ids = torch.arange(3, 25).view(2, 11)
    session = session_on(model, graph)
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
                with session.under(nested[0]):
                    assert close(model(ids).logits, outer)
                    with session.under(nested[1]):
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
    with obeying(model, graph, plan):
        expected = model(ids).logits
    session = session_on(model, graph)
    for chosen in (other, plan, other, plan):
        with session.under(chosen):
            logits = model(ids).logits
        assert chosen is other or torch.equal(logits, expected)
    session.obey(plan)
    assert torch.equal(model(ids).logits, expected)
    session.close()


@torch.no_grad()
def test_a_cache_outlives_a_change_of_plans_and_back(decoder):
    """Its keys lie in the order of the plan's heads, which must be the same the second time."""
    model, graph = decoder
    ids = torch.arange(3, 16)[None]
    plan = plan_of(graph, heads={0: (1, 3, 4, 7), 2: (0, 6, 7)})
    other = plan_of(graph, heads={0: (0, 2, 7), 2: (5, 7)})
    session, cache = session_on(model, graph), DynamicCache()
    with session.under(plan):
        expected = model(ids).logits
    pieces = []
    for part in ids.split([9, 2, 1, 1], 1):
        with session.under(plan):
            pieces.append(model(part, **cached(model, cache)).logits)
        with session.under(other):
            model(ids)
    assert close(torch.cat(pieces, 1), expected)


def test_another_state_of_a_copied_weight_is_not_taken_for_it():
    """Memory that is freed may be given to the next state: same parameter, address and version."""
    generator = torch.Generator().manual_seed(0)
    linear = bound("rows", False, generator)
    lanes = ((1, 3), (4, 5))
    product = KeptProduct(linear, lanes, Copies(1 << 20))
    linear.module.requires_grad_(False)
    features = kept_features(linear, lanes)
    for _ in range(20):
        for _ in range(2):
            product.refresh()
        for _ in range(2):
            linear.parameter.data = torch.randn(linear.parameter.shape, generator=generator)
        product.refresh()
        rows = torch.randn(2, linear.weight.shape[1], generator=generator)
        right = F.linear(rows, linear.weight[features], linear.bias[features])
        torch.testing.assert_close(product(rows), right)


# -- one linear ------------------------------------------------------------------------------------


def copied(linear, lanes):
    """A product with a frozen weight, whose kept features are copied together."""
    linear.module.requires_grad_(False)
    part = KeptProduct(linear, lanes, Copies(10**6))
    for _ in range(2):
        part.refresh()
    return part


def narrowed(kept, bias):
    """Of a linear with 16 outputs; the slice holds the first `kept` of them, and the last."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(5, 16, bias=bias)})
    binding = Binding("up", "out", (Block(0, 1, 1),))
    (linear,) = bind_site(model, Site("mlp.0", "mlp", 0, "up", 16, 16, (binding,))).linears
    lanes = ((0, kept - 1), (15, 16))
    rows = [*range(kept - 1), 15]
    weight, offset = linear.module.weight[rows].detach(), linear.module.bias
    part = copied(linear, lanes)
    return part, weight, None if offset is None else offset[rows].detach()


def narrowed_columns(kept):
    """Of a linear with 16 inputs; as `narrowed`."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"down": nn.Linear(16, 6)})
    binding = Binding("down", "in", (Block(0, 1, 1),))
    (linear,) = bind_site(model, Site("mlp.0", "mlp", 0, "down", 16, 16, (binding,))).linears
    lanes = ((0, kept - 1), (15, 16))
    part = copied(linear, lanes)
    weight, bias = linear.module.weight.detach(), linear.module.bias.detach()
    return part, weight[:, [*range(kept - 1), 15]], bias


@pytest.fixture
def by_onednn():
    """Small weights are multiplied as large ones are; counts how often."""
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
                calls.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with by_onednn_everywhere(), Calls():
        yield calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", [3, 8, 11])
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (2, 7), (1, 1), (3, 2), (2, 3, 4)])
def test_the_layout_of_outputs(kept, bias, shape, by_onednn):
    part, weight, offset = narrowed(kept, bias)
    features = torch.randn(*shape, 5)
    result = part(features)
    torch.testing.assert_close(result, F.linear(features, weight, offset))
    # Heads are split from features by a view, and rows are often flattened by one.
    assert result.is_contiguous()


@needs_onednn
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_onednn_multiplies(axis, rows, by_onednn):
    part, weight, offset = narrowed(11, True) if axis == "out" else narrowed_columns(11)
    features = torch.randn(rows, weight.shape[1])
    result = part(features)
    assert by_onednn == [features.shape]
    torch.testing.assert_close(result, F.linear(features, weight, offset))


def test_what_onednn_would_copy_is_linear_s(by_onednn):
    """Of columns that are no copy, and of a transposed weight, oneDNN makes one every time."""
    features, weight = torch.randn(3, 8), torch.randn(6, 16)[:, 4:12]
    for view in (weight, torch.randn(8, 6).t()):
        assert torch.equal(kept_linear(features, view, None), F.linear(features, view))
    assert not by_onednn


def test_features_from_a_view_that_cannot_be_flattened(by_onednn):
    part, weight, offset = narrowed(11, True)
    features = torch.randn(3, 2, 5).transpose(0, 1)
    torch.testing.assert_close(part(features), F.linear(features, weight, offset))


@needs_onednn
def test_a_small_weight_is_linear_s(by_onednn, monkeypatch):
    monkeypatch.setattr(products, "SMALL", 256 * 255 + 1)
    features, weight = torch.randn(1, 255), torch.randn(256, 255)
    assert torch.equal(kept_linear(features, weight, None), F.linear(features, weight))
    assert not by_onednn
    kept_linear(torch.randn(1, 256), torch.randn(256, 256), None)
    assert by_onednn


@needs_onednn
def test_flops_are_counted(by_onednn):
    features, weight = torch.randn(2, 3, 5), torch.randn(11, 5)
    with FlopCounterMode(display=False) as counter:
        kept_linear(features, weight, None)
    assert counter.get_total_flops() == 2 * 2 * 3 * 5 * 11


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_the_operator_of_compiled_graphs(bias):
    offset = torch.randn(11) if bias else None
    inputs = torch.randn(2, 3, 5), torch.randn(11, 5), offset
    torch.library.opcheck(torch.ops.planner.kept_linear, inputs)
    found = torch.ops.planner.kept_linear(*inputs)
    torch.testing.assert_close(found, F.linear(*inputs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (2, 7)])
def test_no_features_at_all(shape, bias, by_onednn):
    """A block with no head left may still have biases."""
    offset = torch.randn(11) if bias else None
    weight = torch.empty(11, 0)
    expected = torch.zeros(*shape, 11) if offset is None else offset.expand(*shape, 11)
    assert torch.equal(kept_linear(torch.empty(*shape, 0), weight, offset), expected)
    assert kept_linear(torch.randn(*shape, 5), torch.empty(0, 5), None).shape == (*shape, 0)


def test_no_rows_at_all(by_onednn):
    part, _, _ = narrowed(11, True)
    assert part(torch.randn(2, 0, 5)).shape == (2, 0, 11)


def test_gradients_flow_through(by_onednn):
    part, weight, offset = narrowed(11, True)
    features = torch.randn(2, 7, 5, requires_grad=True)
    part(features).square().sum().backward()
    (expected,) = torch.autograd.grad(F.linear(features, weight, offset).square().sum(), features)
    torch.testing.assert_close(features.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_linear_s(dtype, by_onednn):
    part, weight, offset = narrowed(11, True)
    part.linear.module.to(dtype)
    for _ in range(2):
        part.refresh()
    features = torch.randn(2, 7, 5).to(dtype)
    assert torch.equal(part(features), F.linear(features, weight.to(dtype), offset.to(dtype)))


def test_autocast_decides_on_the_type(by_onednn):
    part, _, _ = narrowed(11, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert part(torch.randn(2, 7, 5)).dtype == torch.bfloat16
