"""The ops: PyTorch against the twins, gradients, registration, plans that change."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from blocks import assert_close, random_lanes, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, case_of, cast_inputs, changed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.nn import functional as F

from planner.ir.errors import InputError
from planner.kernels.ops.attend import Attend
from planner.kernels.ops.choose_tokens import ChooseTokens
from planner.kernels.ops.op import Op
from planner.kernels.ops.project_columns import ProjectColumns
from planner.kernels.ops.project_rows import ProjectRows
from planner.kernels.survivors import Survivors, neuron_width
from planner.kernels.triton.launch import counted

OP_CASES = [case for case in CASES if isinstance(case_of(*case).inputs, Op)]
GRADIENTS = [
    case for case in OP_CASES if type(case_of(*case).inputs).gradients is not Op.gradients
][::2]


def named(cases):
    return pytest.mark.parametrize(("name", "index"), cases, ids=[f"{n} {i}" for n, i in cases])


def op_of(name, index, dtype):
    """A call of an op, with numbers where kernels would read nothing."""
    inputs = cast_inputs(case_of(name, index).inputs, dtype)
    return changed(inputs, lambda x: x.nan_to_num(0.5) if x.is_floating_point() else x)


def leaves_of(inputs):
    """Names of the tensors that have gradients."""
    return [
        name
        for name, value in vars(inputs).items()
        if torch.is_tensor(value) and value.is_floating_point() and name != "mask"
    ]


@named(OP_CASES)
def test_pytorch_computes_what_the_twin_does(name, index):
    given = cast_inputs(case_of(name, index).inputs, torch.float64)
    want, got = given.twin(), given.run(triton=False)
    # What a kernel leaves unwritten PyTorch may fill.
    got = torch.where(want.isnan(), want, got) if want.is_floating_point() else got
    assert_close(got.double().nan_to_num(0.0), want.double().nan_to_num(0.0), torch.float64)


@named(OP_CASES[::4])
def test_ops_are_registered_properly(name, index):
    inputs = op_of(name, index, torch.float32)
    if (name, index) in GRADIENTS:
        for leaf in leaves_of(inputs):
            getattr(inputs, leaf).requires_grad_()
    opcheck(inputs.overload, inputs.flat(False))


@named(GRADIENTS)
def test_gradients(name, index):
    """Against finite differences; what is undefined beyond a plan's count is left out."""
    inputs = op_of(name, index, torch.float64)
    defined = ~cast_inputs(case_of(name, index).inputs, torch.float64).twin().isnan()
    leaves = leaves_of(inputs)

    def run(*values):
        given = replace(inputs, **dict(zip(leaves, values, strict=True)))
        return torch.where(defined, given.run(triton=False), 0)

    values = [getattr(inputs, leaf).detach().clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


def mlp(x, up, gate, down, survivors, triton, biases=(None, None), activation="silu"):
    """An MLP block as the executor runs it."""
    first = ProjectRows(x, up, biases[0], survivors, gate=gate, activation=activation)
    return ProjectColumns(first.run(triton=triton), down, biases[1], survivors).run(triton=triton)


def test_gradients_are_those_of_the_masked_block():
    survivors = Survivors.of([range(8, 13), range(16, 24), [0, 3]], 24, 8)
    up, gate, down = (w.double() for w in (weight(24, 12), weight(24, 12), weight(12, 24)))
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    alive = torch.zeros(3, 1, 24, dtype=torch.float64)
    for row in range(3):
        alive[row, :, survivors.kept(row)] = 1

    def masked(x):
        return F.linear(F.silu(x @ gate.T) * (x @ up.T) * alive, down)

    found = []
    for block in (masked, lambda x: mlp(x, up, gate, down, survivors, triton=False)):
        leaf, parameters = x.clone().requires_grad_(), (up, down, gate)
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
    up, down = weight(neurons, 40), weight(40, neurons)
    x, biases = torch.randn(3, 5, 40), (torch.randn(neurons), torch.randn(40))
    alive = torch.zeros(plans, 1, neurons)
    for row, lanes in enumerate(kept):
        alive[row, :, lanes] = 1
    want = F.linear(F.gelu(F.linear(x, up, biases[0])) * alive, down, biases[1])
    with counted() as counter:
        got = mlp(x, up, None, down, survivors, triton, biases, "gelu")
    assert_close(got, want.double(), torch.float32)
    assert dict(counter) == ({"project_rows": 1, "project_columns": 1} if triton else {})


def test_everything_surviving_is_the_dense_product():
    x, w, bias = torch.randn(2, 3, 12), weight(20, 12), torch.randn(20)
    everything = Survivors.of([range(20)], 20, 4)
    for packed in (True, False):
        op = ProjectRows(x, w, bias, everything, packed)
        assert torch.equal(op.run(triton=False), F.linear(x, w, bias))


@pytest.mark.parametrize("triton", [False, True])
def test_nothing_may_survive(triton):
    """No features of a product, and a product of none: its bias."""
    nothing, x, bias = Survivors.packed(()), torch.randn(2, 3, 12), torch.randn(20)
    first = ProjectRows(x, weight(20, 12), bias, nothing)
    assert first.run(triton=triton).shape == (2, 3, 0)
    scattered = ProjectRows(x, weight(20, 12), bias, Survivors.of([[]], 20), packed=False)
    assert not scattered.run(triton=triton).any()
    last = ProjectColumns(torch.empty(2, 3, 0), weight(20, 12), bias, nothing)
    assert torch.equal(last.run(triton=triton), bias.expand(2, 3, 20))


def test_values_narrower_than_keys():
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 3)
    survivors = Survivors.of([[1]], 2)
    op = Attend(query, key, value, None, survivors, 0.3)
    got, want = op.run(triton=True), op.twin()
    assert_close(got[:, :, :2], want[:, :, :2].double(), torch.float32)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_choice_is_exact_even_among_equals(data):
    batch, count = 3, data.draw(st.integers(1, 50))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    scores = torch.randint(-3, 4, (batch, count), generator=generator).float()
    eligible = torch.rand(batch, count, generator=generator) < 0.7
    counts = torch.randint(0, count + 2, (batch,), generator=generator)
    choice = ChooseTokens(scores, eligible, counts)
    for triton in (False, True):
        assert torch.equal(choice.run(triton=triton), choice.twin())


def test_new_plans_do_not_recompile():
    weights = weight(24, 12), weight(24, 12), weight(12, 24)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def block(x, units, counts, lanes):
        return mlp(x, *weights, Survivors(units, counts, 8, lanes), triton=False)

    for _ in range(20):
        firsts = torch.randint(3, (2,)).tolist()
        neurons = Survivors.of([range(8 * first + 1, 24) for first in firsts], 24, 8)
        x = torch.randn(2, 5, 12)
        got = block(x, neurons.units, neurons.counts, neurons.lanes)
        assert_close(got, mlp(x, *weights, neurons, triton=True).double(), torch.float32)
    assert counter.frame_count == 1


def test_plans_must_fit_the_batch():
    two = Survivors.of([[0], [1]], 3)
    for triton in (False, True):
        with pytest.raises(InputError, match="2 plans do not fit 5 samples"):
            ProjectRows(torch.randn(5, 1, 4), weight(3, 4), None, two).run(triton=triton)
        with pytest.raises(InputError, match="2 plans do not fit 5 samples"):
            ProjectColumns(torch.randn(5, 1, 3), weight(4, 3), None, two).run(triton=triton)


@pytest.mark.parametrize(
    ("x", "w", "complaint"),
    [
        (torch.randn(1, 5), weight(3, 4), "5 features meet a weight for 4"),
        (torch.randn(1, 4), weight(3, 4).bfloat16(), "float32 features meet a weight in"),
    ],
)
def test_kernels_refuse_shapes_that_do_not_fit(x, w, complaint):
    with pytest.raises(InputError, match=complaint):
        ProjectRows(x, w, None, Survivors.of([[1]], 3)).run(triton=True)


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
from planner.kernels.ops.project_columns import ProjectColumns
from planner.kernels.survivors import Survivors
a, weight = torch.randn(2, 3, 16), torch.randn(8, 16)
survivors = Survivors.of([range(8, 16)], 16, 8)
got = ProjectColumns(a, weight, None, survivors).run(triton=False)
torch.testing.assert_close(got, a[..., :8] @ weight[:, 8:].T)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
