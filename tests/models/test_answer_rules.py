"""Caches that store a share of an answer, against the stock model under masks made in loops."""

import pytest
import torch
from plans import plan_of

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.models.running.kv_cache import kv_bytes
from planner.models.running.skipping import obeying
from planner.planning.compiler import Request, plan_graph
from planner.planning.plan_costs import PlanCosts
from planner.planning.selectors import parse_kv_policy

STEPS = 9


def greedy(model, inputs, **options):
    """(ids of the answer, logits of every step, the run) of greedy decoding."""
    run = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return run.sequences[:, -STEPS:], torch.stack(run.logits, 1), run


def stored(rule, share, decoded, drawn):
    """Which tokens of an answer are stored once so many are decoded."""
    tokens = range(decoded)
    if rule == "recent":
        most = -(-decoded * share[0] // share[1])
        return [token for token in tokens if token >= decoded - most]
    if rule == "alternate":
        turns = [token * share[0] // share[1] for token in range(decoded)]
        return [token for token in tokens if turns[token] not in turns[:token]]
    return [token for token in tokens if token in drawn]


@pytest.mark.parametrize("share", [(1, 2), (1, 3), (1, 1)])
@pytest.mark.parametrize("rule", ["alternate", "random", "recent"])
@torch.no_grad()
def test_an_answer_sees_what_was_stored_of_it(llava, rule, share):
    family, graph = llava
    inputs = family.inputs(2, before=(3, 6))
    policy = parse_kv_policy(f"answer:{rule},share={share[0] / share[1]},k=0")
    drawn = {token for token in range(STEPS) if policy.stores(token)}
    with obeying(family.model, graph, plan_of(graph, kv=str(policy))):
        answer, logits, run = greedy(family.model, inputs)
    for row in range(2):
        asked = inputs["input_ids"][row, inputs["attention_mask"][row].bool()]
        whole = torch.cat([asked, answer[row]])[None]
        mask = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
        for token in range(STEPS):
            seen = stored(rule, share, token, drawn)
            for other in range(token):
                mask[len(asked) + token, len(asked) + other] = other in seen
        pixels = inputs["pixel_values"][row : row + 1]
        output = family.model(input_ids=whole, attention_mask=mask[None, None], pixel_values=pixels)
        expected = output.logits[0, len(asked) - 1 : -1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
    held = run.past_key_values.layers[0].keys.shape[2] - inputs["input_ids"].shape[1]
    assert held == len(stored(rule, share, STEPS - 1, drawn)) <= policy.most(STEPS - 1)


@pytest.mark.parametrize("rule", ["alternate", "random"])
@torch.no_grad()
def test_decoding_without_a_cache_is_the_same(llava, rule):
    family, graph = llava
    inputs = family.inputs(2, before=(3, 6))
    with obeying(family.model, graph, plan_of(graph, kv=f"answer:{rule}")):
        answer, logits, _ = greedy(family.model, inputs)
        again, without, _ = greedy(family.model, inputs, use_cache=False)
    assert torch.equal(answer, again)
    torch.testing.assert_close(logits, without, rtol=1e-4, atol=1e-4)
    with (
        obeying(family.model, graph, plan_of(graph, kv="answer:recent")),
        pytest.raises(InputError, match="leave use_cache on"),
    ):
        greedy(family.model, inputs, use_cache=False)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.5, 0.3, 0.8])
def test_random_draws_one_token_of_every_distance(seed, share):
    policy = parse_kv_policy(f"answer:random,share={share},seed={seed}")
    kept = [policy.stores(token) for token in range(60)]
    assert abs(sum(kept) - 60 * share) <= 1
    assert all(sum(kept[:n]) <= policy.most(n) for n in range(61))
    other = parse_kv_policy(f"answer:random,share={share},seed={seed + 1}")
    assert kept != [other.stores(token) for token in range(60)]


@torch.no_grad()
def test_the_cache_holds_the_bytes_that_it_was_priced_at(llava):
    family, graph = llava
    inputs = family.inputs(before=(30,))
    words = inputs["input_ids"].shape[1] - 16
    sizes = {"image_tokens": 16, "text_tokens": words, "new_tokens": STEPS - 1}
    for rule in ("alternate", "recent"):
        request = Request("llava", kv=f"answer:{rule},k=1", switches="layers", **sizes)
        plan = plan_graph(graph, request).plan
        with obeying(family.model, graph, plan):
            cache = greedy(family.model, inputs)[2].past_key_values
        load = Workload.default(graph, 16, words, STEPS - 1)
        assert kv_bytes(cache) == plan.cost["kv"]["plan"]
        assert PlanCosts(graph, load).of(plan)["kv"]["plan"] == plan.cost["kv"]["plan"]


@pytest.mark.parametrize("text", ["answer:oldest", "answer:random,share=0", "answer:random,k=-1"])
def test_what_is_out_of_range_is_said(text):
    with pytest.raises(InputError, match="out of range"):
        parse_kv_policy(text)
