"""Small models under torch.compile(backend="planner"), and what they should compute."""

import copy

import torch
from families import FAMILIES
from plans import plan_of
from torch import nn

from planner.ir.lowering import lower_model
from planner.models.running.masked import Gates, MaskedExecutor

TOLERANCE = 1e-5
# What is left is run as it is: these tests are of the rewriting, one below of inductor.
EAGER = {"inner": "eager", "utilities": "prior"}

_known = {}


def family(name):
    """A tiny model of three layers and its Graph; models are left as they were."""
    if name not in _known:
        built = FAMILIES[name]()
        # Compiling takes its time for each.
        text = built.model.config.get_text_config()
        text.num_hidden_layers = 3
        if vars(text).get("layer_types"):
            text.layer_types = text.layer_types[:3]
        del built.model.get_decoder().layers[3:]
        _known[name] = built, lower_model(built.model, name)
    return _known[name]


def compiled(model, **options):
    return torch.compile(model, backend="planner", options=EAGER | options)


def logits(model, inputs):
    """Of the tokens that are no padding."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def masked(model, graph, chosen, inputs):
    chosen = chosen if isinstance(chosen, list) else [chosen]
    with MaskedExecutor(model, graph).using(Gates.of(chosen, graph)):
        return logits(model, inputs)


def assert_near(got, want):
    assert got.shape == want.shape
    assert (got - want).norm() <= TOLERANCE * want.norm()


def mixed_plan(graph):
    """A layer off, heads and neurons off, one block with nothing left."""
    return plan_of(graph, layers_off=(1,), heads={0: (1,), 2: ()}, mlp={0: (0, 3, 4), 2: (6,)})


def twins(name, count=2):
    """Models of one class with weights of their own; TorchDynamo compiles them once."""
    built, graph = family(name)
    return [copy.deepcopy(built.model) for _ in range(count)], graph, built.inputs(batch=2)


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def of_another_class(model):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in model.model.layers:
        layer.mlp.down_proj = Scaled(96, 64, bias=False)
        layer.self_attn.o_proj = Scaled(64, 64, bias=False)
    return model
