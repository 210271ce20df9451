"""What wraps, shares or quantises a planned model: looked through and right, or one sentence."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plans import plan_of
from torch import nn
from torch.nn.parallel import DataParallel
from torch.testing._internal.two_tensor import TwoTensor

import planner
from planner.ir.errors import InputError
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.session import Session

IDS = torch.arange(3, 25).view(2, 11)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def masked(model, graph, plan):
    with MaskedExecutor(model, graph).using(Gates.of([plan], graph)):
        return logits(model)


@pytest.fixture
def model(qwen3):
    return copy.deepcopy(qwen3[0].model)


@pytest.fixture
def graph(qwen3):
    return qwen3[1]


@pytest.fixture
def plan(graph):
    return plan_of(graph, layers_off=(0,), heads={1: (1,)}, mlp={1: (0, 3, 5), 2: (2, 6)})


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# -- copies and wrappers ---------------------------------------------------------------------------


class Holder(nn.Module):
    """A module of somebody's own around a model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


WRAPPERS = {
    "holder": Holder,
    "DataParallel": DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "several": lambda model: DataParallel(Holder(torch.compile(Holder(model), backend="eager"))),
}


# What compiles is slow, and takes one order each.
@pytest.mark.parametrize(
    ("name", "first"),
    [
        *((name, first) for name in ("holder", "DataParallel") for first in ("wrapper", "plan")),
        ("compiled", "plan"),
        ("several", "wrapper"),
    ],
)
def test_wrappers_are_looked_through(model, graph, plan, name, first):
    torch.compiler.reset()
    right = masked(model, graph, plan)
    stock = logits(model)
    if first == "plan":
        planner.compile(model, plan=plan)
    wrapped = WRAPPERS[name](model)
    if first == "wrapper":
        near(logits(wrapped), stock)
        assert planner.compile(wrapped, plan=plan) is wrapped
    near(logits(wrapped), right)
    with planner.budget(wrapped, 1.0):
        near(logits(wrapped), stock)
    assert planner.plan_of(wrapped) is plan
    near(logits(wrapped), right)
    planner.restore(wrapped)
    near(logits(wrapped), stock)
    assert Session.of(model) is None
    torch.compiler.reset()


def test_a_shallow_copy_has_the_parts_of_its_model_and_their_plan(model, plan):
    stock = logits(model)
    planner.compile(model, plan=plan)
    right = logits(model)
    twin = copy.copy(model)
    assert torch.equal(logits(twin), right)
    with planner.budget(model, 1.0):
        assert torch.equal(logits(twin), stock)
    planner.restore(model)
    assert torch.equal(logits(twin), stock)
    with pytest.raises(InputError, match="not compiled"):
        planner.plan_of(twin)
    planner.compile(twin, plan=plan)
    assert torch.equal(logits(twin), right)
    planner.restore(twin)
    assert torch.equal(logits(model), stock)


def test_two_processes_average_the_gradients_of_what_the_plan_keeps(tmp_path):
    """Started afresh: a process with threads of its own cannot be forked safely."""
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# -- weights that are no plain matrix --------------------------------------------------------------


class Scaled(nn.Linear):
    """Computes more than its product, though its weight is a matrix."""

    def forward(self, x):
        return 2 * super().forward(x)


class Written(nn.Linear):
    """Another way to write a product, as Falcon's."""

    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


def exchanged(linear_class):
    def exchange(model):
        for layer in model.model.layers:
            linear = linear_class(64, 96, bias=False)
            linear.weight = layer.mlp.up_proj.weight
            layer.mlp.up_proj = linear
        return model

    return exchange


def packed(model):
    """A weight that is a tensor of another class, as torchao's are."""
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight.detach()
        layer.mlp.down_proj.weight = nn.Parameter(TwoTensor(weight, weight))
    return model


def in_bytes(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def by_torchao(name):
    def quantise(model):
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.model, getattr(torchao, name)())
        return model

    return quantise


def by_bitsandbytes(name):
    def quantise(model):
        modules = pytest.importorskip("bitsandbytes").nn
        for layer in model.model.layers:
            linear = getattr(modules, name)(64, 96, bias=False)
            linear.load_state_dict(layer.mlp.up_proj.state_dict())
            layer.mlp.up_proj = linear.to("cpu")
        return model

    return quantise


def offloaded(model):
    return pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


QUANTISED = {
    "a linear of its own": exchanged(Scaled),
    "a tensor of its own": packed,
    "torch.ao, dynamic": in_bytes,
    "torchao int8": by_torchao("Int8WeightOnlyConfig"),
    "torchao float8": by_torchao("Float8WeightOnlyConfig"),
    "bitsandbytes int8": by_bitsandbytes("Linear8bitLt"),
    "bitsandbytes 4 bits": by_bitsandbytes("Linear4bit"),
    "offloaded": offloaded,
}
quantised = pytest.mark.parametrize("change", QUANTISED.values(), ids=QUANTISED)
other_s_warnings = pytest.mark.filterwarnings("ignore")


@other_s_warnings
@quantised
def test_what_cannot_be_narrowed_stays_whole(model, graph, change, caplog):
    """A budget is met by what is left to switch, and a plan that wants more is refused at once."""
    model = change(model)
    stock = logits(model)
    planner.compile(model, 0.6)
    plan = planner.plan_of(model)
    assert plan.cost["flops"]["fraction"] <= 0.6
    assert "some heads and MLPs stay whole: " in caplog.text
    assert not torch.equal(logits(model), stock)
    off = plan_of(graph, layers_off=(1,))
    with planner.budget(model, off):
        got = logits(model)
    with pytest.raises(InputError, match=r"the plan narrows mlp\.1, but .*"):
        planner.budget(model, plan_of(graph, mlp={1: (0, 3)}))
    planner.restore(model)
    assert torch.equal(logits(model), stock)
    near(got, masked(model, graph, off))


@other_s_warnings
@quantised
def test_what_is_quantised_under_a_plan_is_one_sentence(model, plan, change):
    planner.compile(model, plan=plan)
    logits(model)
    model = change(model)
    with pytest.raises(InputError, match=r"plain matrix|more than a product"):
        logits(model)
    with planner.budget(model, plan_of(planner.api.graph_of(model), layers_off=(1,))):
        assert logits(model).isfinite().all()


def test_a_product_written_in_another_way_is_narrowed(model, graph, plan):
    model = exchanged(Written)(model)
    right = masked(model, graph, plan)
    planner.compile(model, plan=plan)
    near(logits(model), right)
