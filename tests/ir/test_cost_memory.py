"""Predicted peak memory against the bytes that really are alive while a model runs."""

import functools
import weakref

import pytest
import torch
from families import FAMILIES, cached
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig

from planner.ir.cost import Workload, activation_bytes, peak_bytes
from planner.ir.cost.price import operator_parameters
from planner.ir.dims import Dim
from planner.ir.graph import Graph, Operator
from planner.ir.lowering import lower_model

SHAPE = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": None,
}
# Gated MLP and grouped queries; plain MLP, parallel attention and an activation in many steps.
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "phi": PhiConfig(**SHAPE),
}


class LiveBytes(TorchDispatchMode):
    """Bytes of what is alive inside, parameters aside: `held` from before, and what is made."""

    def __init__(self, model, held=()):
        super().__init__()
        weights = [*model.parameters(), *model.buffers()]
        self.known = {weight.untyped_storage()._cdata for weight in weights}
        self.live = {}
        self.peak = 0
        self.note(held)

    def note(self, values):
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.known | self.live.keys():
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        self.note(output)
        return output


def without_parameters(graph, sizes):
    element = int(graph.properties["dtype_bytes"])
    return peak_bytes(graph, sizes) - element * sum(map(operator_parameters, graph))


@functools.cache
def text_model(name, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype).eval().requires_grad_(False)
    return model, lower_model(model, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_bound_holds_and_is_close(name, dtype):
    model, graph = text_model(name, dtype)
    for batch, tokens in ((1, 300), (3, 64)):
        load = Workload(0, tokens, batch=batch)
        words = torch.randint(1, 500, (batch, tokens))
        with LiveBytes(model) as prefill:
            output = model(input_ids=words, logits_to_keep=1)
        bound = without_parameters(graph, load.prefill())
        assert prefill.peak <= bound <= 1.5 * prefill.peak
        cache = output.past_key_values
        with LiveBytes(model, [(c.keys, c.values) for c in cache.layers]) as step:
            model(input_ids=words[:, -1:], **cached(model, cache))
        bound = without_parameters(graph, load.decode(1))
        assert step.peak <= bound <= 1.5 * step.peak


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_the_bound_holds_with_images(name):
    family = FAMILIES[name]()
    model = family.model.requires_grad_(False)
    graph = lower_model(model, name)
    inputs = family.inputs(batch=2, before=(60,))
    text = inputs["input_ids"].shape[1] - family.image_tokens
    sizes = Workload.default(graph, family.image_tokens, text, batch=2).prefill()
    with LiveBytes(model) as live:
        model(**inputs, logits_to_keep=1)
    bound = without_parameters(graph, sizes)
    assert live.peak <= bound <= 1.5 * live.peak


def chain(*operators):
    made = [
        Operator(name, kind, inputs, (Dim.of("query"), Dim(width)), module, attributes=attributes)
        for name, kind, inputs, width, module, attributes in operators
    ]
    return Graph("chain", tuple(made), (), {"dtype_bytes": 2})


def test_a_value_lives_until_its_last_reader():
    graph = chain(
        ("x", "input", (), 10, "", ()),
        ("wide", "add", ("x",), 40, "", ()),
        ("narrow", "add", ("wide",), 5, "", ()),
        ("sum", "add", ("narrow", "x"), 10, "", ()),
    )
    # x, wide and narrow at once; after that wide is gone.
    assert activation_bytes(graph, {"query": 3}) == 2 * 3 * (10 + 40 + 5)


def test_an_argument_lives_until_the_call_returns():
    inside = (
        ("x", "input", (), 10, "model", ()),
        ("up", "add", ("x",), 40, "model.mlp.up", ()),
        ("act", "add", ("up",), 40, "model.mlp.act", ()),
        ("down", "add", ("act",), 10, "model.mlp.down", ()),
    )
    # While act is computed x has no reader left, but the caller of model.mlp still holds it.
    assert activation_bytes(chain(*inside), {"query": 1}) == 2 * (10 + 40 + 40)


def test_composite_operators_hold_values_on_the_way():
    norm = chain(("x", "input", (), 10, "", ()), ("n", "norm", ("x",), 10, "", ()))
    assert activation_bytes(norm, {"query": 1}) == 2 * (10 + 10) + 3 * 4 * 10
    for function, held in (("silu", 0), ("tanh", 3 * 2 * 10)):
        attributes = (("function", function),)
        graph = chain(
            ("x", "input", (), 10, "", ()), ("a", "activation", ("x",), 10, "", attributes)
        )
        assert activation_bytes(graph, {"query": 1}) == 2 * (10 + 10) + held
