"""The ops: PyTorch against the twins, gradients, registration, plans that change."""

import subprocess
import sys

import pytest
import torch
from blocks import assert_close, random_lanes, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, NAMED, case_of, cast_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.nn import functional as F

from planner.ir.errors import InputError
from planner.kernels.ops import attend as attend_file
from planner.kernels.ops import (
    choose_tokens,
    gather_tokens,
    project_columns,
    project_rows,
    project_up,
    score_tokens,
)
from planner.kernels.ops.mlp import MLPWeights, mlp
from planner.kernels.survivors import Survivors, neuron_width
from planner.kernels.triton.launch import counted

OPS = {
    file.op.name: file.op
    for file in (
        attend_file,
        choose_tokens,
        gather_tokens,
        project_columns,
        project_rows,
        project_up,
        score_tokens,
    )
}
OP_CASES = [case for case in CASES if case[0] in OPS]
NAMES = [f"{name} {index}" for name, index in OP_CASES]


def _inputs(name, case, dtype=torch.float64):
    """In the op's order, with the survivors last, and numbers where kernels would read nothing."""
    given = cast_inputs(case.inputs, dtype)
    given = {k: v.nan_to_num(0.5) if torch.is_tensor(v) else v for k, v in given.items()}
    survivors = given.pop("survivors", None)
    return [*given.values(), *([] if survivors is None else [survivors])]


@pytest.mark.parametrize(("name", "index"), OP_CASES, ids=NAMES)
def test_pytorch_computes_what_the_twin_does(name, index):
    case = case_of(name, index)
    given = cast_inputs(case.inputs, torch.float64)
    want = NAMED[name].twin(**given)
    survivors = given.pop("survivors", None)
    last = [] if survivors is None else [survivors]
    got = OPS[name](*given.values(), *last, triton=False)
    # What a kernel leaves unwritten PyTorch may fill.
    got = torch.where(want.isnan(), want, got) if want.is_floating_point() else got
    assert_close(got.double().nan_to_num(0.0), want.double().nan_to_num(0.0), torch.float64)


@pytest.mark.parametrize(("name", "index"), OP_CASES[::4], ids=NAMES[::4])
def test_ops_are_registered_properly(name, index):
    op, inputs = OPS[name], _inputs(name, case_of(name, index), torch.float32)
    for value in inputs:
        if torch.is_tensor(value) and value.is_floating_point() and name in DIFFERENTIABLE:
            value.requires_grad_()
    if name == "attend" and torch.is_tensor(inputs[3]):
        inputs[3].requires_grad_(False)
    opcheck(op.overload, op.flat(*inputs, triton=False))


DIFFERENTIABLE = ("attend", "gather_tokens", "project_columns", "project_rows", "project_up")
GRADIENTS = [case for case in OP_CASES if case[0] in DIFFERENTIABLE][::2]


@pytest.mark.parametrize(("name", "index"), GRADIENTS, ids=[f"{n} {i}" for n, i in GRADIENTS])
def test_gradients(name, index):
    """Against finite differences; what is undefined beyond a plan's count is left out."""
    case = case_of(name, index)
    inputs, twin = _inputs(name, case), NAMED[name].twin
    defined = ~twin(**cast_inputs(case.inputs, torch.float64)).isnan()
    leaves = [i for i, value in enumerate(inputs) if torch.is_tensor(value)]
    leaves = [i for i in leaves if inputs[i].is_floating_point() and (name, i) != ("attend", 3)]

    def run(*values):
        full = [*inputs]
        for place, value in zip(leaves, values, strict=True):
            full[place] = value
        return torch.where(defined, OPS[name](*full, triton=False), 0)

    values = [inputs[place].detach().clone().requires_grad_() for place in leaves]
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


def test_gradients_are_those_of_the_masked_block():
    survivors = Survivors.of([range(8, 13), range(16, 24), [0, 3]], 24, 8)
    weights = MLPWeights(*(w.double() for w in (weight(24, 12), weight(12, 24), weight(24, 12))))
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    alive = torch.zeros(3, 1, 24, dtype=torch.float64)
    for row in range(3):
        alive[row, :, survivors.kept(row)] = 1

    def masked(x):
        return F.linear(F.silu(x @ weights.gate.T) * (x @ weights.up.T) * alive, weights.down)

    found = []
    for block in (masked, lambda x: mlp(x, weights, survivors, triton=False)):
        leaf, parameters = x.clone().requires_grad_(), (weights.up, weights.down, weights.gate)
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_()
        block(leaf).square().sum().backward()
        found.append([leaf.grad, *(parameter.grad for parameter in parameters)])
    for want, got in zip(*found, strict=True):
        assert_close(got, want, torch.float64)
    assert not found[1][1][13:16].any()  # neurons that no plan keeps


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("plans", [1, 3])
@pytest.mark.parametrize("neurons", [1032, 130, 37])
def test_mlp(triton, plans, neurons):
    kept = [random_lanes(neurons), [], random_lanes(neurons)][:plans]
    survivors = Survivors.of(kept, neurons, neuron_width(neurons))
    weights = MLPWeights(
        weight(neurons, 40),
        weight(40, neurons),
        activation="gelu",
        up_bias=torch.randn(neurons),
        down_bias=torch.randn(40),
    )
    x = torch.randn(3, 5, 40)
    alive = torch.zeros(plans, 1, neurons)
    for row, lanes in enumerate(kept):
        alive[row, :, lanes] = 1
    want = F.linear(F.gelu(F.linear(x, weights.up, weights.up_bias)) * alive, weights.down)
    with counted() as counter:
        got = mlp(x, weights, survivors, triton=triton)
    assert_close(got, (want + weights.down_bias).double(), torch.float32)
    assert dict(counter) == ({"project_up": 1, "project_columns": 1} if triton else {})


def test_everything_surviving_is_the_dense_product():
    x, w, bias = torch.randn(2, 3, 12), weight(20, 12), torch.randn(20)
    everything = Survivors.of([range(20)], 20, 4)
    for packed in (True, False):
        got = project_rows.project_rows(x, w, bias, everything, packed=packed, triton=False)
        assert torch.equal(got, F.linear(x, w, bias))


def test_values_narrower_than_keys():
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 3)
    survivors = Survivors.of([[1]], 2)
    options = {"scale": 0.3, "causal": False}
    got = attend_file.attend(query, key, value, None, survivors, triton=True, **options)
    want = attend_file.naive_attend(query, key, value, None, 0.3, False, survivors)
    assert_close(got[:, :, :2], want[:, :, :2].double(), torch.float32)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_choice_is_exact_even_among_equals(data):
    batch, count = 3, data.draw(st.integers(1, 50))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    scores = torch.randint(-3, 4, (batch, count), generator=generator).float()
    eligible = torch.rand(batch, count, generator=generator) < 0.7
    counts = torch.randint(0, count + 2, (batch,), generator=generator)
    want = choose_tokens.naive_choose_tokens(scores, eligible, counts)
    for triton in (False, True):
        got = choose_tokens.choose_tokens(scores, eligible, counts, triton=triton)
        assert torch.equal(got, want)


def test_new_plans_do_not_recompile():
    weights = MLPWeights(weight(24, 12), weight(12, 24), weight(24, 12))
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def block(x, units, counts, lanes):
        return mlp(x, weights, Survivors(units, counts, 8, lanes), triton=False)

    for _ in range(20):
        firsts = torch.randint(3, (2,)).tolist()
        neurons = Survivors.of([range(8 * first + 1, 24) for first in firsts], 24, 8)
        x = torch.randn(2, 5, 12)
        got = block(x, neurons.units, neurons.counts, neurons.lanes)
        assert_close(got, mlp(x, weights, neurons, triton=True).double(), torch.float32)
    assert counter.frame_count == 1


def test_plans_must_fit_the_batch():
    two = Survivors.of([[0], [1]], 3)
    for triton in (False, True):
        with pytest.raises(InputError, match="2 plans do not fit 5 samples"):
            project_rows.project_rows(
                torch.randn(5, 1, 4), weight(3, 4), None, two, packed=True, triton=triton
            )
        with pytest.raises(InputError, match="2 plans do not fit 5 samples"):
            project_columns.project_columns(
                torch.randn(5, 1, 3), weight(4, 3), None, two, triton=triton
            )


@pytest.mark.parametrize(
    ("x", "w", "complaint"),
    [
        (torch.randn(1, 5), weight(3, 4), "5 features meet a weight for 4"),
        (torch.randn(1, 4), weight(3, 4).bfloat16(), "float32 features meet a weight in"),
    ],
)
def test_kernels_refuse_shapes_that_do_not_fit(x, w, complaint):
    with pytest.raises(InputError, match=complaint):
        project_rows.project_rows(x, w, None, Survivors.of([[1]], 3), packed=True, triton=True)


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
from torch.nn import functional as F
from planner.kernels.ops.mlp import MLPWeights, mlp
from planner.kernels.survivors import Survivors
weights = MLPWeights(torch.randn(16, 8), torch.randn(8, 16))
survivors = Survivors.of([[1, 2, 9]], 16, 8)
x = torch.randn(2, 3, 8)
alive = torch.zeros(16)
alive[[1, 2, 9]] = 1
want = F.linear(F.silu(F.linear(x, weights.up)) * alive, weights.down)
torch.testing.assert_close(mlp(x, weights, survivors, triton=False), want)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
