"""Weights that PyTorch moves, exchanges or computes: a plan goes by what they are in a pass."""

import copy

import pytest
import torch
from plans import plan_of
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import planner
from planner.ir.errors import InputError
from planner.models.running.masked import Gates, MaskedExecutor

IDS = torch.arange(3, 14)[None]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture
def graph(qwen3):
    return qwen3[1]


@pytest.fixture
def plan(graph):
    return plan_of(graph, layers_off=(0,), heads={1: (1,)}, mlp={1: (0, 3, 5), 2: (2, 6)})


@pytest.fixture
def model(qwen3):
    return copy.deepcopy(qwen3[0].model)


def masked(model, graph, plan):
    with MaskedExecutor(model, graph).using(Gates.of([plan], graph)):
        return logits(model)


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def some_linears(model):
    layers = model.model.layers
    return layers[1].mlp.up_proj, layers[1].self_attn.q_proj, layers[2].mlp.down_proj


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


REWRITINGS = {
    "parametrised": lambda linear: parametrize.register_parametrization(linear, "weight", Twice()),
    "parametrised norm": parametrizations.weight_norm,
    "norm": weight_norm,
    "spectral norm": lambda linear: spectral_norm(linear).eval(),
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rewrite", REWRITINGS.values(), ids=REWRITINGS)
def test_weights_that_are_computed_from_others(model, graph, plan, rewrite, frozen):
    twin = copy.deepcopy(model)
    planner.compile(model, plan=plan, freeze=frozen)
    for _ in range(3):
        before = logits(model)
    for each in (model, twin):
        # A spectral norm begins with random vectors.
        torch.manual_seed(0)
        for linear in some_linears(each):
            rewrite(linear)
    near(logits(model), masked(twin, graph, plan))
    with torch.no_grad():
        for each in (model, twin):
            for linear in some_linears(each):
                for parameter in linear.parameters():
                    parameter.mul_(1.5)
    right = masked(twin, graph, plan)
    for _ in range(2):
        near(logits(model), right)
    assert not torch.allclose(before, right)


def test_a_block_that_runs_as_one_kernel_does_not_pass_hooks_over(model, graph, plan):
    """Such as those of a norm: known before planning, or one sentence."""
    up = model.model.layers[1].mlp.up_proj
    seen = []
    with up.register_forward_hook(lambda *_: seen.append(1)):
        planner.compile(model, plan=plan, kernels="triton")
        logits(model)
        assert seen
    planner.compile(model, plan=plan, kernels="triton")
    prune.l1_unstructured(up, "weight", 0.5)
    with pytest.raises(InputError, match=r"up_proj has hooks since.*kernels='torch'"):
        logits(model)


def to_empty(model, state):
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False)
    # What is computed as a model is built is in no state.
    fresh = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb.inv_freq.copy_(fresh.inv_freq)


MOVES = {
    "share_memory": lambda model, state: model.share_memory(),
    "to_empty": to_empty,
    "assigned": lambda model, state: model.load_state_dict(state, assign=True),
    "double and back": lambda model, state: model.double().float(),
    "meta and back": lambda model, state: to_empty(model.to("meta"), state),
    "in inference mode": lambda model, state: torch.inference_mode()(model.load_state_dict)(state),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_weights_that_are_moved(model, graph, plan, move, frozen):
    planner.compile(model, plan=plan, freeze=frozen)
    for _ in range(3):
        logits(model)
    state = {name: 1.5 * value for name, value in model.state_dict().items()}
    with torch.no_grad():
        if move in (MOVES["share_memory"], MOVES["double and back"]):
            model.load_state_dict(state)
        move(model, state)
    twin = planner.restore(copy.deepcopy(model))
    right = masked(twin, graph, plan)
    for _ in range(2):
        near(logits(model), right)


@pytest.mark.parametrize("frozen", [False, True])
def test_another_type_inside_a_block(model, plan, frozen):
    planner.compile(model, 1.0, freeze=frozen, utilities="prior")
    with planner.budget(model, plan):
        before = logits(model)
        logits(model)
        half = logits(model.half())
        assert half.dtype == torch.half
        assert (half.float() - before).norm() < 0.05 * before.norm()
        near(logits(model.float()), logits(model))
    assert logits(model).dtype == torch.float


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_given_for_one_call(model, graph, plan, frozen):
    twin = copy.deepcopy(model)
    planner.compile(model, plan=plan, freeze=frozen)
    for _ in range(3):
        before = logits(model)
    given = {name: 1.5 * value for name, value in model.state_dict().items()}
    twin.load_state_dict(given)
    with torch.no_grad():
        got = functional_call(model, given, kwargs={"input_ids": IDS}).logits
    near(got, masked(twin, graph, plan))
    near(logits(model), before)


def test_states_go_round(model, plan):
    """A planned model's state is the stock model's, and fits it."""
    stock = copy.deepcopy(model)
    planner.compile(model, plan=plan)
    logits(model)
    state, other = model.state_dict(), stock.state_dict()
    assert list(state) == list(other)
    with torch.no_grad():
        for value in state.values():
            value.mul_(1.5)
    stock.load_state_dict(model.state_dict())
    model.load_state_dict(stock.state_dict())
    assert torch.equal(logits(planner.restore(model)), logits(stock))
