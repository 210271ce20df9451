"""A narrowed run equals the masked one: prefill and decoding, every family, random plans."""

import torch
from families import IMAGE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onednn import by_onednn_everywhere
from plans import dense_plan, plan_of, plans

from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.skipping import obeying
from planner.models.tokens.selectors import DecoderInputs, select_tokens
from planner.planning.selectors import Uniform

STEPS = 33


def generate(model, inputs, steps=STEPS, **options):
    """Tokens, shape (batch, steps), and logits, shape (steps, batch, vocabulary)."""
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences[:, -steps:], torch.stack(out.logits)


def uniform_gates(plan, inputs):
    """What a plan's uniform stages keep, sample by sample without padding: layer -> flags."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    gates = {}
    left = torch.ones_like(mask)
    for stage in plan.tokens:
        left = left.clone()
        for row in range(len(ids)):
            where = (left[row] & mask[row]).nonzero().flatten()
            image = (ids[row, where] == IMAGE)[None]
            keep = select_tokens(
                Uniform(stage.keep), DecoderInputs(image, torch.ones_like(image)), stage.layer
            )
            left[row, where] = keep.keep[0]
        gates[stage.layer] = left.float()
    return gates


def assert_same_run(actual, expected):
    (tokens, logits), (right_tokens, right_logits) = actual, expected
    error = (logits - right_logits).norm(dim=-1) / right_logits.norm(dim=-1)
    assert error.max() <= 1e-5
    assert torch.equal(tokens, right_tokens)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_narrowed_equals_masked(each_family, data):
    family, graph = each_family
    plan = data.draw(plans(graph, family.image_tokens))
    inputs = family.inputs(seed=data.draw(st.integers(0, 9)))
    compare_runs(family, graph, plan, inputs, data.draw(st.sampled_from([4, 4, STEPS])))


def compare_runs(family, graph, plan, inputs, steps):
    """Narrowed against masked; small weights are multiplied as large ones are."""
    gates = Gates.of([plan], graph, uniform_gates(plan, inputs))
    with MaskedExecutor(family.model, graph).using(gates):
        expected = generate(family.model, inputs, steps)
    with by_onednn_everywhere(), obeying(family.model, graph, plan):
        actual = generate(family.model, inputs, steps)
    assert_same_run(actual, expected)


def test_two_threads_compute_as_one(qwen3, llava):
    """Few runs: threads of processes that share cores wait for one another."""
    torch.set_num_threads(2)
    for family, graph in (qwen3, llava):
        plan = plan_of(graph, layers_off=(0,), heads={1: (0,)}, mlp={1: (0, 2, 3), 2: ()})
        compare_runs(family, graph, plan, family.inputs(seed=0), steps=3)


@torch.no_grad()
def test_the_dense_plan_is_the_stock_model_bit_by_bit(each_family):
    family, graph = each_family
    inputs = family.inputs(batch=2, before=(2, 4))
    logits, run = family.model(**inputs).logits, generate(family.model, inputs, 8)
    with obeying(family.model, graph, dense_plan(graph)):
        assert torch.equal(family.model(**inputs).logits, logits)
        for ours, stock in zip(generate(family.model, inputs, 8), run, strict=True):
            assert torch.equal(ours, stock)


@torch.no_grad()
def test_samples_may_divide_an_mlp_differently(qwen3):
    family, graph = qwen3
    both = [
        plan_of(graph, mlp={1: (0, 2, 3)}, mlp_switches={1: 7}),
        plan_of(graph, layers_off=(0,), mlp={1: (1, 3)}, mlp_switches={1: 5}),
    ]
    inputs = family.inputs(batch=2, seed=0)
    masked = MaskedExecutor(family.model, graph)
    alone = []
    for row, plan in enumerate(both):
        with masked.using(Gates.of([plan, plan], graph)):
            alone.append(family.model(**inputs).logits[row])
    with masked.using(Gates.of(both, graph)):
        together = family.model(**inputs).logits
    assert (together - torch.stack(alone)).norm() <= 1e-6 * together.norm()
    assert not torch.equal(alone[0], alone[1])
