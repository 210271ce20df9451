"""Whole small models on planner's kernels, interpreted: prompts, decoded tokens, plans by sample.

What is compared runs the same plan by PyTorch. Sums are taken in another order, in float32 both
times, so logits agree to a few times its precision.
"""

import logging

import pytest
import torch
import transformers
from families import FAMILIES, randomise
from plans import plan_of
from torch.nn import functional as F

import planner
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.kernels.triton.launch import counted
from planner.plan import TokenStage

TOLERANCE = 2e-6
LINEARS = {"project_rows", "project_columns"}
DECODER = {*LINEARS, "attend"}
STAGE = {"score_tokens", "choose_tokens", "gather_tokens"}


def _plans(family, graph):
    """Layers, heads, neurons and tokens off, a block with nothing left; and another."""
    heads, mlp = {0: (1,), 2: ()}, {0: (0, 3, 4), 2: (6,)}
    tokens = (TokenStage(2, 5, 16, "fastv"),) if family.image_tokens else ()
    return [
        plan_of(graph, layers_off=(1,), heads=heads, mlp=mlp, tokens=tokens),
        plan_of(graph, heads={0: (0,)}, mlp={1: (2, 3), 2: ()}),
    ]


def _decoded(model, inputs, tokens=2):
    """Logits behind the prompt, and behind some tokens more."""
    options = {"max_new_tokens": tokens + 1, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        return model.generate(**inputs, **options, return_dict_in_generate=True).logits


def _answers(model, inputs):
    """Logits of all the prompt's tokens, and of two decoded ones, the second behind the first."""
    with torch.no_grad():
        prompt = model(**inputs).logits[inputs["attention_mask"].bool()]
    return [prompt, *_decoded(model, inputs)[1:]]


def _assert_near(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= TOLERANCE * other.norm()


# GQA and images; norms of queries and keys; both, with windows. Heads are shared in all of them.
@pytest.mark.parametrize("name", ["llava", "qwen3", "gemma3"])
def test_models_run_on_kernels_end_to_end(name):
    family = FAMILIES[name]()
    model, inputs = family.model, family.inputs(batch=2, before=(3, 6))
    plan, _ = _plans(family, lower_model(model, name))
    found = []
    for kernels in ("torch", "triton"):
        planner.compile(model, plan=plan, kernels=kernels)
        with counted() as counter:
            found.append(_answers(model, inputs))
        wanted = DECODER | (STAGE if family.image_tokens else set())
        assert {*counter} == (wanted if kernels == "triton" else set())
    planner.restore(model)
    _assert_near(found[1], found[0])


def test_samples_run_plans_of_their_own():
    family = FAMILIES["llava"]()
    model, inputs = family.model, family.inputs(batch=2, before=(3, 6))
    plans = _plans(family, lower_model(model, "llava"))
    found = []
    for kernels in ("torch", "triton"):
        planner.compile(model, plan=plans[0], kernels=kernels)
        with planner.budget(model, plans), counted() as counter:
            found.append(_answers(model, inputs))
    planner.restore(model)
    assert {*counter} == DECODER | STAGE
    _assert_near(found[1], found[0])


# Images, and heads that share keys; these and norms of queries and keys, with windows.
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_compiled_models_run_on_kernels(name):
    """One launch of a kernel serves both samples, each under its plan."""
    family = FAMILIES[name]()
    model, inputs = family.model, family.inputs(batch=2, before=(3, 6))
    graph = lower_model(model, name)
    plans = [plan_of(graph, heads=p.heads, mlp=p.mlp) for p in _plans(family, graph)]
    planner.compile(model, plan=plans[0], kernels="torch")
    with planner.budget(model, plans):
        want = _decoded(model, inputs, tokens=1)
    planner.restore(model)
    torch.compiler.reset()
    options = {"inner": "eager", "samples": 2, "kernels": "triton", "utilities": "prior"}
    model.compile(backend="planner", options=options)
    planner.budget(model, plans)
    with counted() as counter:
        got = _decoded(model, inputs, tokens=1)
    model._compiled_call_impl = None
    planner.restore(model)
    torch.compiler.reset()
    passes = len(got)
    assert counter == {
        "project_rows": 4 * graph.layers * passes,
        "attend": graph.layers * passes,
        "project_columns": 2 * graph.layers * passes,
    }
    _assert_near(got, want)


def test_auto_is_pytorch_on_a_cpu():
    family = FAMILIES["qwen3"]()
    model, inputs = family.model, family.inputs(batch=2)
    plan, _ = _plans(family, lower_model(model, "qwen3"))
    answers = []
    for kernels in ("torch", "auto"):
        planner.compile(model, plan=plan, kernels=kernels)
        with counted() as counter:
            answers.append(_answers(model, inputs))
        assert not counter
    planner.restore(model)
    assert all(torch.equal(one, other) for one, other in zip(*answers))


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = {
    # Gate and up in one weight: linear by linear.
    "phi3": transformers.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
    # The MLP's linears are the layer's own.
    "opt": transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32,
    ),
    # Scores that are capped, which no kernel does.
    "gemma2": transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, attn_implementation="eager"
    ),
}  # fmt: skip
# Launches of a layer.
LAUNCHES = {
    "phi3": {"project_rows": 2, "attend": 1, "project_columns": 2},
    "opt": {"project_rows": 4, "attend": 1, "project_columns": 2},
    "gemma2": {"project_rows": 4, "project_columns": 2},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_kernels_have_no_block_for_runs_linear_by_linear(name, caplog):
    torch.manual_seed(0)
    model = randomise(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]), 0)
    graph = lower_model(model, name)
    plan = plan_of(graph, heads={0: (1,)}, mlp={1: (0, 2, 3)})
    ids = torch.randint(3, 60, (1, 7))
    found = []
    caplog.set_level(logging.WARNING, logger="planner")
    for kernels in ("torch", "triton"):
        planner.compile(model, plan=plan, kernels=kernels)
        with torch.no_grad(), counted() as counter:
            found.append(model(ids).logits)
    planner.restore(model)
    assert counter == {kernel: 2 * count for kernel, count in LAUNCHES[name].items()}
    _assert_near([found[1]], [found[0]])
    assert ("caps scores" in caplog.text) == (name == "gemma2")


def test_gradients_reach_the_stock_weights():
    family = FAMILIES["qwen3"]()
    model, inputs = family.model, family.inputs(batch=2)
    plan, _ = _plans(family, lower_model(model, "qwen3"))
    found = []
    for kernels in ("torch", "triton"):
        planner.compile(model, plan=plan, kernels=kernels)
        model.zero_grad()
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        F.log_softmax(logits, -1)[:, 5].sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    planner.restore(model)
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        assert (found[1][name] - want).norm() <= 2e-5 * want.norm() + 1e-9, name


def test_budgets_leave_the_choice_as_it_is():
    family = FAMILIES["qwen3"]()
    model, inputs = family.model, family.inputs()
    planner.compile(model, 0.5, kernels="triton")
    with planner.budget(model, 0.7), torch.no_grad(), counted() as counter:
        model(**inputs)
    assert counter
    with pytest.raises(InputError, match="kernels is 'cuda': choose from auto, triton, torch"):
        planner.compile(model, 0.5, kernels="cuda")
    planner.restore(model)
