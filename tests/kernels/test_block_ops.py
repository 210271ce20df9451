"""The custom ops: registered properly, differentiable, compiled once for all plans."""

import subprocess
import sys

import pytest
import torch
from blocks import (
    assert_close,
    cast,
    kept_positions,
    poisoned_cache,
    random_angles,
    random_attention,
    random_lanes,
    random_mlp,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from planner.ir.errors import InputError
from planner.kernels import block_ops as ops
from planner.kernels import naive
from planner.kernels.library import pack_attention, pack_mlp
from planner.kernels.records import Survivors


def _differentiable(inputs: tuple) -> tuple:
    return tuple(
        x.detach().clone().requires_grad_()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in inputs
    )


def _mlp_inputs(dtype=torch.float32, **options):
    weights = cast(random_mlp(12, 24, **options), dtype)
    survivors = Survivors.of([[*range(3, 13)], [0, 7, *range(16, 24)]], 24, 8)
    x = torch.randn(2, 5, 12, dtype=dtype)
    return x, weights, survivors, torch.randn_like(x)


def _attention_inputs(dtype=torch.float32, **options):
    weights = cast(random_attention(12, 3, 2, 4, **options), dtype)
    survivors = Survivors.of([[0, 2], [1]], 3)
    x = torch.randn(2, 5, 12, dtype=dtype)
    cos, sin = random_angles(1, 5, 4)
    angles = (cos.to(dtype), sin.to(dtype))
    return x, weights, survivors, angles, kept_positions(5, 9, (0, 1)), torch.randn_like(x)


VARIANTS = [
    {},
    {"biased": True, "norm": "layer"},
]


@pytest.mark.parametrize("options", [*VARIANTS, {"gated": False, "norm": None}])
def test_mlp_op_is_registered_properly(options):
    inputs = pack_mlp(*_mlp_inputs(**options))
    opcheck(torch.ops.planner.mlp.default, _differentiable(inputs))


@pytest.mark.parametrize("options", [*VARIANTS, {"head_norm": True, "norm": None}])
def test_attention_op_is_registered_properly(options):
    inputs = pack_attention(*_attention_inputs(**options), True, None)
    rotation = slice(14, 16)  # cosines and sines carry gradients too, but nobody trains them
    tracked = list(_differentiable(inputs))
    tracked[rotation] = inputs[rotation]
    opcheck(torch.ops.planner.attention.default, tuple(tracked))


def test_backward_ops_are_registered_properly():
    x, *_ = block = _mlp_inputs()
    mlp = (torch.randn_like(x), [0, 2, 3], *pack_mlp(*block))
    opcheck(torch.ops.planner.mlp_backward.default, mlp)
    x, *_ = block = _attention_inputs()
    attention = (torch.randn_like(x), [0, 2, 5], *pack_attention(*block, True, None))
    opcheck(torch.ops.planner.attention_backward.default, attention)


def _cached_inputs():
    x, weights, survivors, angles, positions, residual = _attention_inputs()
    packed = pack_attention(x, weights, survivors, angles, positions, residual, True, None)
    cache = poisoned_cache([2, 1], [6, 5], 4, torch.float32)
    stored = (cache.keys, cache.values, cache.first, cache.room, cache.lengths)
    return (*packed, *stored, positions), cache


def test_other_ops_are_registered_properly():
    inputs, _ = _cached_inputs()
    inputs[28].zero_()  # NaN differs from itself, which the checks take for a change
    inputs[29].zero_()
    opcheck(torch.ops.planner.attention_cached.default, inputs)
    hidden, queries = torch.randn(2, 6, 12), torch.randn(2, 6, 4)
    survivors = Survivors.of([[0, 2], [1]], 3)
    keys, first, room = torch.randn(18, 4), *torch.tensor([[0, 12], [6, 6]]).int()
    positions = torch.arange(6, dtype=torch.int32).repeat(2, 1)
    candidates = positions.bool()
    keep = torch.tensor([3, 2], dtype=torch.int32)
    plan = (survivors.units, survivors.counts, positions, candidates, keep)
    selection = (hidden.requires_grad_(), queries, keys, first, room, *plan, 4, 0.5)
    opcheck(torch.ops.planner.select_tokens.default, selection)
    target = torch.tensor([[0, 0, -1, 2, 1, 2]] * 2, dtype=torch.int32)
    merging = (hidden, target, torch.rand(2, 6), 4)
    opcheck(torch.ops.planner.merge_tokens.default, merging)


@pytest.mark.parametrize(
    "options", [{}, {"biased": True, "norm": "layer", "activation": "gelu"}, {"gated": False}]
)
def test_mlp_gradients(options):
    inputs = _differentiable(pack_mlp(*_mlp_inputs(torch.float64, **options)))
    assert torch.autograd.gradcheck(torch.ops.planner.mlp, inputs, fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"biased": True, "norm": "layer", "head_norm": True}])
def test_attention_gradients(options):
    packed = pack_attention(*_attention_inputs(torch.float64, **options), True, None)
    inputs = (*_differentiable(packed[:14]), *packed[14:])
    assert torch.autograd.gradcheck(torch.ops.planner.attention, inputs, fast_mode=True)


def test_gradients_are_those_of_the_masked_block():
    x, weights, survivors, residual = _mlp_inputs(torch.float64)
    for block in (ops.mlp, naive.mlp):
        x.grad = weights.up.grad = None
        x.requires_grad_()
        weights.up.requires_grad_()
        block(x, weights, survivors, residual).square().sum().backward()
        if block is ops.mlp:
            sparse = x.grad, weights.up.grad
    assert_close(sparse[0], x.grad, torch.float64)
    assert_close(sparse[1], weights.up.grad, torch.float64)
    assert not sparse[1][13:16].any()  # neurons that no plan keeps


def test_token_gradients():
    target = torch.tensor([[0, 0, -1, 2, 1, 2]], dtype=torch.int32)
    x = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(1, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.merge_tokens(x, target, weight, 4), x)
    cache = poisoned_cache([1], [6], 4, torch.float64)
    cache.keys.normal_()
    positions = torch.arange(6, dtype=torch.int32)[None]

    def select(x):
        return ops.select_tokens(
            x,
            torch.ones(1, 1, 4, dtype=torch.float64),
            cache,
            Survivors.of([[0]], 1),
            positions,
            positions > 1,
            torch.tensor([2], dtype=torch.int32),
            5,
            scale=1.0,
        )[0]

    assert torch.autograd.gradcheck(select, x)


def test_cached_attention_writes_keys_and_values_and_nothing_else():
    inputs, cache = _cached_inputs()
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    torch.ops.planner.attention_cached(*inputs)
    stored = {28, 29}
    for index, (old, new) in enumerate(zip(before, inputs)):
        if isinstance(new, torch.Tensor) and index not in stored:
            assert torch.equal(old, new)
    assert cache.keys.isnan().sum() == 2 * 4  # the sixth token of two groups
    assert cache.values.isnan().sum() == 2 * 4


def test_new_plans_do_not_recompile():
    mlp, attention = random_mlp(12, 24), random_attention(12, 3, 2, 4)
    angles = random_angles(1, 5, 4)
    positions = kept_positions(5, 9, (0, 1))
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def layer(x, heads, neurons):
        x = ops.attention(x, attention, heads, angles, positions, x)
        return ops.mlp(x, mlp, neurons, x)

    for _ in range(20):
        heads = Survivors.of([random_lanes(3) for _ in range(2)], 3)
        firsts = torch.randint(3, (2,)).tolist()
        neurons = Survivors.of([range(8 * first, 24) for first in firsts], 24, 8)
        x = torch.randn(2, 5, 12)
        want = naive.attention(x, attention, heads, angles, positions, x)
        want = naive.mlp(want, mlp, neurons, want)
        assert_close(layer(x, heads, neurons), want, torch.float32)
    assert counter.frame_count == 1


def test_plans_must_fit_the_batch():
    x, weights, survivors, residual = _mlp_inputs()
    with pytest.raises(InputError, match="2 plans do not fit 5 samples"):
        ops.mlp(x.transpose(0, 1), weights, survivors, residual)


def test_the_package_called_kernels_is_hugging_face_s():
    import kernels
    import planner.kernels

    assert hasattr(kernels, "get_kernel")
    assert not set(kernels.__path__) & set(planner.kernels.__path__)


def test_ops_work_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from planner.kernels import block_ops as ops, naive
from planner.kernels.records import MLPWeights, Survivors
weights = MLPWeights(torch.randn(16, 8), torch.randn(8, 16))
survivors = Survivors.of([[1, 2, 9]], 16, 8)
x = torch.randn(2, 3, 8)
torch.testing.assert_close(ops.mlp(x, weights, survivors), naive.mlp(x, weights, survivors))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
