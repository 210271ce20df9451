"""Products with kept features: what they hold, and how their rows lie in memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner.ir.graph import Binding, Block, Site
from planner.kernels.products import VECTOR
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", [3, 8, 11])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (1, 1), (2, 3, 4)])
def test_rows_start_at_whole_vectors(kept, bias, shape):
    part, weight, offset = narrowed(kept, bias)
    features = torch.randn(*shape, 5)
    result = part(features)
    torch.testing.assert_close(result, F.linear(features, weight, offset))
    if torch.Size(shape).numel() > 1:
        assert result.stride(-1) == 1
        assert result.stride(-2) % VECTOR == 0
        # Heads are split from features by a view, and rows are often flattened by one.
        assert result.view(-1, kept).shape == (torch.Size(shape).numel(), kept)
    else:
        assert result.is_contiguous()


def test_features_from_a_view_that_cannot_be_flattened():
    part, weight, offset = narrowed(11, True)
    features = torch.randn(3, 2, 5).transpose(0, 1)
    torch.testing.assert_close(part(features), F.linear(features, weight, offset))


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
