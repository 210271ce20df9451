"""Products with kept features: what they hold, and how their rows lie in memory."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from planner.ir.graph import Binding, Block, Site
from planner.ir.intervals import merged
from planner.kernels.ops import kept_linear as products
from planner.kernels.ops.kept_linear import ONEDNN, kept_linear
from planner.models.running.bindings import bind_site
from planner.models.running.narrowed_linear import SliceStore

needs_onednn = pytest.mark.skipif(not ONEDNN, reason="products are oneDNN's only beside MKL")


def narrowed(kept, bias):
    """Of a linear with 16 outputs; the slice holds the first `kept` of them, and the last."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(5, 16, bias=bias)})
    binding = Binding("up", "out", (Block(0, 1, 1),))
    (linear,) = bind_site(model, Site("mlp.0", "mlp", 0, "up", 16, 16, (binding,))).linears
    lanes = ((0, kept - 1), (15, 16))
    rows = [*range(kept - 1), 15]
    weight, offset = linear.module.weight[rows].detach(), linear.module.bias
    part = SliceStore(10**6).get(linear, lanes, keep=True)
    return part, weight, None if offset is None else offset[rows].detach()


def narrowed_columns(kept):
    """Of a linear with 16 inputs; as `narrowed`."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"down": nn.Linear(16, 6)})
    binding = Binding("down", "in", (Block(0, 1, 1),))
    (linear,) = bind_site(model, Site("mlp.0", "mlp", 0, "down", 16, 16, (binding,))).linears
    lanes = ((0, kept - 1), (15, 16))
    part = SliceStore(10**6).get(linear, lanes, keep=True)
    weight, bias = linear.module.weight.detach(), linear.module.bias.detach()
    return part, weight[:, [*range(kept - 1), 15]], bias


@pytest.fixture
def by_onednn(monkeypatch):
    """Small weights are multiplied as large ones are; counts how often."""
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
                calls.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(products, "SMALL", 1)
    with Calls():
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


@needs_onednn
@settings(max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True)
@given(sequence=st.lists(st.sets(st.integers(0, 15), min_size=1), min_size=2, max_size=6))
def test_columns_that_are_copied_lie_without_gaps(sequence, by_onednn):
    """Whatever plan was there before, of as many lanes or of more or fewer."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(5, 16), "down": nn.Linear(16, 6)})
    bindings = (Binding("up", "out", (Block(0, 1, 1),)), Binding("down", "in", (Block(0, 1, 1),)))
    up, down = bind_site(model, Site("mlp.0", "mlp", 0, "up", 16, 16, bindings)).linears
    store, x = SliceStore(10**6), torch.randn(3, 5)
    for kept in sequence:
        rows, lanes = sorted(kept), merged([(lane, lane + 1) for lane in sorted(kept)])
        store.begin()
        first, last = store.get(up, lanes), store.get(down, lanes)
        assert last.weights[0].is_contiguous()
        hidden = F.linear(x, up.weight[rows], up.bias[rows])
        expected = F.linear(hidden, down.weight[:, rows], down.bias)
        torch.testing.assert_close(last(first(x)), expected.detach())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_linear_s(dtype, by_onednn):
    part, weight, offset = narrowed(11, True)
    part = type(part)(
        part.axis,
        tuple(w.to(dtype) for w in part.weights),
        tuple(b.to(dtype) for b in part.biases),
        part.source,
    )
    features = torch.randn(2, 7, 5).to(dtype)
    assert torch.equal(part(features), F.linear(features, weight.to(dtype), offset.to(dtype)))


def test_autocast_decides_on_the_type(by_onednn):
    part, _, _ = narrowed(11, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert part(torch.randn(2, 7, 5)).dtype == torch.bfloat16
