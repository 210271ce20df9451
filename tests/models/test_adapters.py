"""LoRA adapters (peft) on a planned model: before and after planning, merged and unmerged."""

import copy

import peft
import pytest
import torch
from plans import plan_of
from torch import nn

import planner
from planner.ir.errors import InputError
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.session import Session
from planner.plan import TokenStage

# Of transformers, about names that peft uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
IDS = torch.arange(3, 14)[None]


def some_plan(graph):
    return plan_of(graph, layers_off=(0,), heads={1: (1,)}, mlp={1: (0, 3, 5), 2: (2, 6)})


def adapted(model, **options):
    """With adapters that change something."""
    options = {"target_modules": TARGETS, "r": 4, "lora_dropout": 0.0} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    randomise(wrapped)
    return wrapped.eval()


def randomise(wrapped):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def masked(wrapped, graph, plan):
    """What the model answers by masks, its adapters among it."""
    stock = copy.deepcopy(wrapped)
    session = Session.of(stock)
    if session is not None:
        session.close()
    with MaskedExecutor(stock.get_base_model(), graph).using(Gates.of([plan], graph)):
        return logits(stock)


@pytest.fixture
def model(qwen3):
    return copy.deepcopy(qwen3[0].model)


@pytest.mark.parametrize("first", ["adapters", "plan"])
def test_adapters_and_plans_in_either_order(model, qwen3, first):
    plan = some_plan(qwen3[1])
    if first == "plan":
        planner.compile(model, plan=plan)
        before = logits(model)
    wrapped = adapted(model)
    if first == "adapters":
        before = logits(wrapped)
        assert planner.compile(wrapped, plan=plan) is wrapped
    assert planner.plan_of(wrapped) is plan
    right = masked(wrapped, qwen3[1], plan)
    assert not torch.allclose(right, before)
    torch.testing.assert_close(logits(wrapped), right, rtol=1e-4, atol=1e-4)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), right, rtol=1e-4, atol=1e-4)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(logits(wrapped), right, rtol=1e-4, atol=1e-4)
    with wrapped.disable_adapter():
        torch.testing.assert_close(
            logits(wrapped), masked_without(wrapped, qwen3[1], plan), rtol=1e-4, atol=1e-4
        )
    wrapped.add_adapter("other", peft.LoraConfig(target_modules=TARGETS, r=2))
    randomise(wrapped)
    wrapped.set_adapter("other")
    other = masked(wrapped, qwen3[1], plan)
    assert not torch.allclose(other, right)
    torch.testing.assert_close(logits(wrapped), other, rtol=1e-4, atol=1e-4)
    wrapped.set_adapter("default")
    right = masked(wrapped, qwen3[1], plan)
    base = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(base), right, rtol=1e-4, atol=1e-4)
    planner.restore(base)


def masked_without(wrapped, graph, plan):
    stock = copy.deepcopy(wrapped)
    Session.of(stock).close()
    gates = Gates.of([plan], graph)
    with stock.disable_adapter(), MaskedExecutor(stock.get_base_model(), graph).using(gates):
        return logits(stock)


def test_adapters_learn_under_a_plan_what_they_learn_under_its_masks(model, qwen3):
    plan = some_plan(qwen3[1])
    wrapped = adapted(model)

    def gradients():
        wrapped.zero_grad()
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        return {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}

    with MaskedExecutor(wrapped.get_base_model(), qwen3[1]).using(Gates.of([plan], qwen3[1])):
        right = gradients()
    planner.compile(wrapped, plan=plan)
    found = gradients()
    assert found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-4, atol=1e-5, msg=name)
    assert not any(right[name].any() for name in right if name not in found)


def test_token_stages_behind_a_wrapper_that_runs_no_hooks(llava):
    """peft calls ``forward`` of the model that it wraps."""
    family, graph = llava
    plan = plan_of(graph, mlp={0: (0, 4)}, tokens=(TokenStage(2, 4, 16),))
    inputs = family.inputs()
    planner.compile(model := copy.deepcopy(family.model), plan=plan)
    with torch.no_grad():
        right = model(**inputs).logits
        assert torch.equal(model.forward(**inputs).logits, right)
        wrapped = adapted(model, target_modules=r".*language_model.*up_proj")
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped(**inputs).logits, right)


def test_adapters_of_another_kind_are_refused_in_one_sentence(model, qwen3):
    wrapped = adapted(model, use_dora=True)
    with pytest.raises(InputError, match=r"q_proj|up_proj.*no plain LoRA"):
        planner.compile(wrapped, plan=some_plan(qwen3[1]))
    assert isinstance(wrapped.get_base_model(), nn.Module)
    assert Session.of(wrapped) is None
    planner.compile(wrapped, plan=plan_of(qwen3[1], layers_off=(1,)))
    logits(wrapped)
