"""Products with kept features: what they hold, and how their rows lie in memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from planner.ir.graph import Binding, Block, Site
from planner.kernels import products
from planner.kernels.products import FEW, MKL, VECTOR, kept_linear
from planner.models.bindings import bind_site
from planner.models.slices import SliceStore


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


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    monkeypatch.setattr(products, "SMALL", 0)
    torch.set_num_threads(request.param)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", [3, 8, 11])
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (2, 7), (1, 1), (3, 2), (2, 3, 4)])
def test_the_layout_of_outputs(kept, bias, shape, threads):
    part, weight, offset = narrowed(kept, bias)
    features = torch.randn(*shape, 5)
    result = part(features)
    torch.testing.assert_close(result, F.linear(features, weight, offset))
    rows = torch.Size(shape).numel()
    assert result.stride(-1) == 1
    if rows == 1 or (rows < FEW and threads > 1 and MKL):
        assert result.is_contiguous()
    else:
        # Rows start at whole vectors.
        assert result.stride(-2) % VECTOR == 0
    # Heads are split from features by a view, and rows are often flattened by one.
    assert result.view(-1, kept).shape == (rows, kept)


@pytest.mark.skipif(not MKL, reason="turns products round for MKL")
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("rows", range(1, FEW + 2))
def test_few_rows_are_multiplied_from_the_other_side(axis, rows, threads):
    part, weight, offset = narrowed(11, True) if axis == "out" else narrowed_columns(11)
    features = torch.randn(rows, weight.shape[1])
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.addmm:
                calls.append((args[1].shape, args[2].shape))
            return func(*args, **(kwargs or {}))

    with Calls():
        result = part(features)
    torch.testing.assert_close(result, F.linear(features, weight, offset))
    (((first, _), (_, last)),) = calls
    # A matrix-vector product would take one thread: no side is a single row.
    turned = (len(weight), max(rows, 2))
    assert (first, last) == (turned if rows < FEW and threads > 1 else (rows, len(weight)))


def test_features_from_a_view_that_cannot_be_flattened():
    part, weight, offset = narrowed(11, True)
    features = torch.randn(3, 2, 5).transpose(0, 1)
    torch.testing.assert_close(part(features), F.linear(features, weight, offset))


def test_a_small_weight_is_not_worth_turning_round(monkeypatch):
    monkeypatch.setattr(products, "_turned", None)
    torch.set_num_threads(2)
    features, weight = torch.randn(1, 255), torch.randn(256, 255)
    assert torch.equal(kept_linear(features, weight, None), F.linear(features, weight))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (2, 7)])
def test_no_features_at_all(shape, bias, threads):
    """A block with no head left may still have biases."""
    offset = torch.randn(11) if bias else None
    weight = torch.empty(11, 0)
    expected = torch.zeros(*shape, 11) if offset is None else offset.expand(*shape, 11)
    assert torch.equal(kept_linear(torch.empty(*shape, 0), weight, offset), expected)
    assert kept_linear(torch.randn(*shape, 5), torch.empty(0, 5), None).shape == (*shape, 0)


def test_no_rows_at_all():
    part, _, _ = narrowed(11, True)
    assert part(torch.randn(2, 0, 5)).shape == (2, 0, 11)


def test_gradients_flow_through():
    part, weight, offset = narrowed(11, True)
    features = torch.randn(2, 7, 5, requires_grad=True)
    part(features).square().sum().backward()
    (expected,) = torch.autograd.grad(F.linear(features, weight, offset).square().sum(), features)
    torch.testing.assert_close(features.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_linear_s(dtype):
    part, weight, offset = narrowed(11, True)
    part = type(part)(
        part.axis,
        tuple(w.to(dtype) for w in part.weights),
        tuple(b.to(dtype) for b in part.biases),
        part.source,
    )
    features = torch.randn(2, 7, 5).to(dtype)
    assert torch.equal(part(features), F.linear(features, weight.to(dtype), offset.to(dtype)))


def test_autocast_decides_on_the_type():
    part, _, _ = narrowed(11, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert part(torch.randn(2, 7, 5)).dtype == torch.bfloat16
