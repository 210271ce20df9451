"""Attention in two halves: in the stock layout, over survivors alone, differentiable."""

import pytest
import torch
from blocks import assert_close, random_lanes, weight
from torch.library import opcheck
from torch.nn import functional as F

from planner.ir.errors import InputError
from planner.kernels import fused, heads
from planner.kernels.head_ops import attend_heads, project_heads
from planner.kernels.records import Survivors

HIDDEN, GROUPS, SHARED, HEAD_DIM = 12, 5, 2, 4
WIDTHS = (SHARED * HEAD_DIM, HEAD_DIM, HEAD_DIM)
# What CUDA tensors run, here in the interpreter, and what all others run.
BACKENDS = pytest.mark.parametrize("backend", [fused, heads], ids=["fused", "sliced"])


def _plans(count):
    # Nothing, everything and a gap among them.
    return [[0, 1, 4], [], [*range(GROUPS)], [2]][:count]


def _projections(dtype=torch.float32):
    weights = [weight(GROUPS * width, HIDDEN).to(dtype) for width in WIDTHS]
    return weights, [torch.randn(GROUPS * WIDTHS[0], dtype=dtype), None, None]


def _operands(dtype=torch.float32, batch=3, tokens=5, keys=7):
    query = torch.randn(batch, GROUPS * SHARED, tokens, HEAD_DIM, dtype=dtype)
    key, value = torch.randn(2, batch, GROUPS, keys, HEAD_DIM, dtype=dtype)
    output = weight(HIDDEN, GROUPS * SHARED * HEAD_DIM).to(dtype)
    mask = torch.rand(batch, 1, tokens, keys) < 0.7
    mask[..., 0] = True
    return query, key, value, mask, output


def _alive(kept, width):
    """1 for the features of surviving groups, one row per plan."""
    alive = torch.zeros(len(kept), GROUPS)
    for row, lanes in zip(alive, kept, strict=True):
        row[lanes] = 1
    return alive.repeat_interleave(width, dim=1)


def _masked(query, key, value, mask, output, kept, causal=False):
    """What attention over survivors means: all heads, then zeros."""
    key, value = (x.repeat_interleave(SHARED, dim=1) for x in (key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=0.3)
    mixed = mixed.transpose(1, 2).flatten(start_dim=2)
    return F.linear(mixed * _alive(kept, SHARED * HEAD_DIM)[:, None].to(mixed), output)


@BACKENDS
@pytest.mark.parametrize("plans", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_projections_stay_in_place_and_the_rest_is_zero(backend, plans, count):
    kept = [[0, 1, 4], [], [3]][:plans]
    x = torch.randn(3, 6, HIDDEN)
    weights, biases = (tensors[:count] for tensors in _projections())
    want = [
        F.linear(x, w, b) * _alive(kept, width)[:, None]
        for w, b, width in zip(weights, biases, WIDTHS)
    ]
    for tensor, width in [*zip(weights, WIDTHS), (biases[0], WIDTHS[0])]:
        # What survives nowhere is not read.
        tensor[~_alive(kept, width).bool().any(dim=0)] = torch.nan
    outputs = backend.project_heads(x, weights, biases, Survivors.of(kept, GROUPS))
    for got, expected in zip(outputs, want, strict=True):
        assert_close(got, expected, torch.float32)


@BACKENDS
@pytest.mark.parametrize("plans", [1, 3])
@pytest.mark.parametrize("form", ["bool", "added", "causal", "none", "by head"])
def test_attention_over_survivors_is_attention_without_the_others(backend, plans, form):
    kept = _plans(plans)
    query, key, value, mask, output = _operands()
    causal = form == "causal"
    if form == "added":
        mask = torch.where(mask, torch.randn(mask.shape), -torch.inf)
    elif form == "by head":
        mask = mask & (torch.rand(3, GROUPS * SHARED, 5, 7) < 0.9)
        mask[..., 0] = True
    elif form != "bool":
        mask = None
    want = _masked(query, key, value, mask, output, kept, causal)
    # What does not survive is not read.
    for operand, width in ((query, SHARED), (key, 1), (value, 1)):
        operand[~_alive(kept, width).bool().expand(3, -1)] = torch.nan
    if plans == 1:
        output[:, ~_alive(kept, SHARED * HEAD_DIM)[0].bool()] = torch.nan
    survivors = Survivors.of(kept, GROUPS)
    got = backend.attend_heads(query, key, value, mask, output, survivors, scale=0.3, causal=causal)
    assert_close(got, want, torch.float32)


@BACKENDS
def test_widths_that_no_kernel_has(backend):
    """An odd number of features per group, and values narrower than keys."""
    x, kept = torch.randn(2, 3, HIDDEN), [[1, 2]]
    survivors = Survivors.of(kept, GROUPS)
    (got,) = backend.project_heads(x, [w := weight(GROUPS * 3, HIDDEN)], [None], survivors)
    assert_close(got, F.linear(x, w) * _alive(kept, 3), torch.float32)
    query, key, value, mask, output = _operands()
    value, output = value[..., :3].contiguous(), output[:, : GROUPS * SHARED * 3].contiguous()
    alive = _alive(kept, SHARED * 3)
    mixed = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    want = F.linear(mixed.transpose(1, 2).flatten(start_dim=2) * alive, output)
    got = backend.attend_heads(query, key, value, mask, output, survivors, scale=0.3, causal=False)
    assert_close(got, want, torch.float32)


def test_keys_repeated_for_their_queries_are_as_good():
    query, key, value, mask, output = _operands()
    survivors = Survivors.of([random_lanes(GROUPS, 3)], GROUPS)
    want = attend_heads(query, key, value, mask, output, survivors, scale=0.3)
    key, value = (x.repeat_interleave(SHARED, dim=1) for x in (key, value))
    got = attend_heads(query, key, value, mask, output, survivors, scale=0.3)
    assert_close(got, want, torch.float32)


def test_everything_surviving_is_the_dense_product():
    x = torch.randn(2, 3, HIDDEN)
    weights, biases = _projections()
    everything = Survivors.of([range(GROUPS)], GROUPS)
    outputs = project_heads(x, weights, biases, everything)
    for out, w, b in zip(outputs, weights, biases, strict=True):
        assert torch.equal(out, F.linear(x, w, b))


def test_ops_are_registered_properly():
    weights, biases = _projections()
    survivors = Survivors.of(_plans(3), GROUPS)
    dials = (survivors.units, survivors.counts)
    x = torch.randn(3, 6, HIDDEN)
    gradients = [torch.randn(3, 6, w.shape[0]) for w in weights]
    backward = (gradients, x, weights, *dials, True)
    opcheck(torch.ops.planner.project_heads_backward.default, backward)
    query, key, value, mask, output = _operands()
    attend = (query, key, value, mask, output, *dials, 0.3, False)
    opcheck(torch.ops.planner.attend_heads_backward.default, (torch.randn(3, 5, HIDDEN), *attend))
    for tensor in (x, *weights, biases[0], query, key, value, output):
        tensor.requires_grad_()
    project = (x, weights, [biases[0]], [True, False, False], *dials)
    opcheck(torch.ops.planner.project_heads.default, project)
    opcheck(torch.ops.planner.attend_heads.default, attend)


@pytest.mark.parametrize("plans", [1, 3])
def test_gradients(plans):
    survivors = Survivors.of(_plans(plans), GROUPS)
    weights, biases = _projections(torch.float64)
    leaves = [torch.randn(3, 4, HIDDEN, dtype=torch.float64), *weights, biases[0]]

    def project(x, q, k, v, bias):
        return tuple(project_heads(x, [q, k, v], [bias, None, None], survivors))

    assert torch.autograd.gradcheck(
        project, [leaf.requires_grad_() for leaf in leaves], fast_mode=True
    )
    query, key, value, mask, output = _operands(torch.float64)
    for given, causal in ((mask, False), (None, True)):

        def attend(q, k, v, o, given=given, causal=causal):
            return attend_heads(q, k, v, given, o, survivors, scale=0.3, causal=causal)

        leaves = [tensor.requires_grad_() for tensor in (query, key, value, output)]
        assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_gradients_without_those_of_weights():
    weights, biases = _projections()
    x = torch.randn(2, 3, HIDDEN, requires_grad=True)
    survivors = Survivors.of([[0, 3]], GROUPS)
    sum(out.sum() for out in project_heads(x, weights, biases, survivors)).backward()
    rows = [w[_alive([[0, 3]], width)[0].bool()] for w, width in zip(weights, WIDTHS)]
    want = sum(kept.sum(dim=0) for kept in rows).expand_as(x)
    assert_close(x.grad, want, torch.float32)


def test_plans_must_fit_the_batch():
    survivors = Survivors.of(_plans(2), GROUPS)
    query, key, value, mask, output = _operands()
    with pytest.raises(InputError, match="2 plans do not fit 3 samples"):
        attend_heads(query, key, value, mask, output, survivors, scale=0.3)
    with pytest.raises(InputError, match="2 plans do not fit 3 samples"):
        project_heads(torch.randn(3, 6, HIDDEN), *_projections(), survivors)
