"""What holds around a narrowed run: batches, caches, turns, searches, restoring, refusals."""

import pytest
import torch
from families import cached
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onednn import by_onednn_everywhere
from plans import MLP_SWITCHES, dense_plan, plan_of, plans
from restored import same_state, snapshot
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from planner.ir.cost import Workload
from planner.ir.cost.device_table import device
from planner.ir.errors import InputError
from planner.kernels.ops.kept_linear import ONEDNN
from planner.models.running.kv_cache import kv_bytes
from planner.models.running.products import Products
from planner.models.running.skipping import obeying, session_on
from planner.plan import TokenStage
from planner.planning.pricing import Pricing
from planner.planning.switches import AXES, SwitchSet, with_switches

RELATIVE = 1e-5


def close(actual, expected):
    return (actual - expected).norm() <= RELATIVE * expected.norm()


def mixed_plan(graph, tokens=()):
    """Something of everything off, layer 0 among it."""
    return plan_of(
        graph,
        layers_off=(0,),
        heads={1: (1,), 2: ()},
        mlp={1: (0, 3, 4), 3: ()},
        tokens=tokens,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_detaching_restores_the_model(llava, fails):
    family, graph = llava
    # The first run of the stock code leaves traces of its own.
    family.model.generate(**family.inputs(), max_new_tokens=2)
    before = snapshot(family.model)
    session = session_on(family.model, graph)
    plan = mixed_plan(graph, (TokenStage(1, 5, 16, "fastv"), TokenStage(3, 2, 16)))
    plan = plan_of(graph, mlp={0: (1,)}, heads={0: (0,)}, tokens=plan.tokens)
    inputs = family.inputs()
    if fails:
        inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
    try:
        with session.under(mixed_plan(graph)), session.under(plan):
            family.model.generate(**inputs, max_new_tokens=2)
    except InputError:
        assert fails
    assert not any("forward" in vars(module) for module in list(family.model.modules())[1:])
    session.obey(plan)
    session.close()
    assert same_state(before, snapshot(family.model))


class CountedProducts(TorchDispatchMode):
    """Counts the products that oneDNN computes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.mkldnn._linear_pointwise
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not ONEDNN, reason="products are oneDNN's only beside MKL")
@by_onednn_everywhere()
@torch.no_grad()
def test_under_a_plan_all_linears_of_the_decoder_multiply_alike(llava, monkeypatch):
    """Narrowed or not; the base model's own code runs for the base model, and where others said."""
    family, graph = llava
    inputs = family.inputs()
    session = session_on(family.model, graph)
    layers = len(session.layers)

    def counted(plan):
        with session.under(plan), CountedProducts() as found:
            family.model(**inputs)
        return found.count

    some = plan_of(graph, layers_off=(0,), heads={1: (1,)}, tokens=(TokenStage(2, 5, 16),))
    # Columns of a stored weight are no matter for oneDNN.
    assert counted(some) == 7 * (layers - 1) - 1
    assert counted(plan_of(graph, layers_off=(0, 3))) == 7 * (layers - 2)
    assert counted(dense_plan(graph)) == 0
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.mkldnn, "enabled", False)
        assert counted(some) == 0
    hooked = session.layers[3].mlp.linears[0].module
    stock, calls = hooked.forward, []
    monkeypatch.setattr(hooked, "forward", lambda x: calls.append(x) or stock(x))
    assert counted(some) == 7 * (layers - 1) - 2
    assert len(calls) == 1


@torch.no_grad()
def test_contexts_nest_and_an_attached_plan_comes_back(llava):
    family, graph = llava
    inputs = family.inputs()
    session = session_on(family.model, graph)
    stock = family.model(**inputs).logits
    one, other = plan_of(graph, heads={0: (0,)}), plan_of(graph, layers_off=(2,))
    with session.under(one):
        first = family.model(**inputs).logits
        with session.under(other):
            second = family.model(**inputs).logits
            with session.under(dense_plan(graph)):
                assert torch.equal(family.model(**inputs).logits, stock)
        assert close(family.model(**inputs).logits, first)
    session.obey(other)
    with session.under(one):
        assert close(family.model(**inputs).logits, first)
    assert torch.equal(family.model(**inputs).logits, second)
    session.close()
    assert torch.equal(family.model(**inputs).logits, stock)
    assert not close(first, stock)
    assert not close(second, stock)


@torch.no_grad()
def test_runs_and_copies_agree_and_copies_stay_within_their_bytes(llava):
    family, graph = llava
    inputs = family.inputs()
    session = session_on(family.model, graph)
    plan = plan_of(graph, mlp=dict.fromkeys(range(4), (0, 2, 3, 6)), heads={1: (1,)})
    with session.under(plan):
        runs = family.model(**inputs).logits
        products = Products(frozen_bytes=40_000)
        session.implementation.use(products)
        assert torch.equal(family.model(**inputs).logits, runs)
        assert products.copies.bytes == 0
        for _ in range(2):
            assert close(family.model(**inputs).logits, runs)
            assert 0 < products.copies.bytes <= 40_000
        down = family.model.model.language_model.layers[0].mlp.down_proj.weight
        saved = down.clone()
        try:
            down.mul_(2)
            changed = family.model(**inputs).logits
            session.implementation.use(Products())
            assert close(changed, family.model(**inputs).logits)
            assert not close(changed, runs)
        finally:
            down.copy_(saved)


@torch.no_grad()
def test_a_cache_holds_the_bytes_that_the_plan_was_priced_at(each_family):
    family, lowered_graph = each_family
    graph = with_switches(lowered_graph, MLP_SWITCHES)
    inputs, images = family.inputs(), family.image_tokens
    stages = (TokenStage(2, 5, images),) if images else ()
    alone = graph.sites_by_name["heads.1"].lanes == 1
    plan = plan_of(graph, layers_off=(0,), heads={1: () if alone else (0,)}, tokens=stages)
    with obeying(family.model, graph, plan):
        run = family.model.generate(
            **inputs, max_new_tokens=5, return_dict_in_generate=True, do_sample=False
        )
    cache = run.past_key_values
    prompt = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == prompt + 4
    assert cache.layers[0].keys is None
    assert alone or cache.layers[1].keys.shape[1:3] == (1, prompt + 4)
    switches = SwitchSet("all", AXES, token_layers=(2,), token_selector="uniform")
    workload = Workload(images, prompt - images, 4, 1, images)
    priced = Pricing(graph, workload, switches, device("v100")).cost_of(plan)["kv"]
    if family.name == "gemma3":
        # Its sliding windows let go of tokens, which the price does not count on.
        assert 0 < kv_bytes(cache) < priced
    else:
        assert kv_bytes(cache) == priced


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_batch_of_plans_equals_one_by_one(each_family, data):
    family, graph = each_family
    batch, images = 4, data.draw(st.integers(1, 2)) if family.image_tokens else 0
    side = data.draw(st.sampled_from(["left", "right"]))
    choice = [data.draw(plans(graph, family.image_tokens, images)) for _ in range(2)]
    choice.append(dense_plan(graph))
    chosen = [data.draw(st.sampled_from(choice)) for _ in range(batch)]
    inputs = family.inputs(
        batch, 1, images=images, before=(3, 1, 6), after=(4, 5, 2), padding_side=side
    )
    session = session_on(family.model, graph)
    with torch.no_grad(), session.under(chosen):
        logits = family.model(**inputs).logits
    for row, plan in enumerate(chosen):
        alone = one_sample(family, inputs, row, batch, images)
        with torch.no_grad(), session.under(plan):
            expected = family.model(**alone).logits[0, -1]
        last = inputs["attention_mask"][row].nonzero().max()
        assert close(logits[row, last], expected)
    if side == "left":
        with session.under(chosen):
            together = family.model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
        for row, plan in enumerate(chosen):
            alone = one_sample(family, inputs, row, batch, images)
            with session.under(plan):
                expected = family.model.generate(**alone, max_new_tokens=4, do_sample=False)
            assert torch.equal(together[row], expected[0, -4:])


def one_sample(family, inputs, row, batch, images):
    """One sample of a batch, without its padding."""
    where = inputs["attention_mask"][row].bool()
    alone = {}
    for name, value in inputs.items():
        if value.shape[:2] == inputs["input_ids"].shape:
            alone[name] = value[row, where][None]
        else:
            each = len(value) // batch
            alone[name] = value[row * each : (row + 1) * each]
    return alone


@by_onednn_everywhere()
@torch.no_grad()
def test_plans_without_token_stages_compile_to_one_graph(qwen3):
    family, graph = qwen3
    ids = family.inputs()["input_ids"]
    session = session_on(family.model, graph)
    session.obey(plan_of(graph, layers_off=(0,), heads={1: (0,)}, mlp={1: (0, 2, 3), 2: ()}))
    expected = family.model(ids).logits
    compiled = torch.compile(family.model, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        assert close(compiled(ids).logits, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    session.close()
    assert close(compiled(ids).logits, family.model(ids).logits)


@torch.no_grad()
def test_compiled_graphs_can_freeze_narrowed_weights(qwen3):
    """Freezing packs weights ahead; of what is no parameter it would know nothing."""
    family, graph = qwen3
    ids, inputs = family.inputs()["input_ids"], []

    def note_inputs(module, example_inputs):
        inputs.extend(module.graph.find_nodes(op="placeholder"))
        return module

    plan = plan_of(graph, heads={1: (0,)}, mlp={1: (0, 2, 3), 2: (1,)})
    with obeying(family.model, graph, plan), torch._inductor.config.patch(freezing=True):
        expected = family.model(ids).logits
        assert close(torch.compile(family.model, backend=note_inputs)(ids).logits, expected)
    assert len(inputs) == 1


@by_onednn_everywhere()
@torch.no_grad()
def test_decoding_behind_a_token_stage_compiles_to_one_graph(llava):
    """Stages choose by value, which breaks graphs; only prompts with images need that."""
    family, graph = llava
    inputs, word = family.inputs(), torch.tensor([[5]])
    plan = plan_of(graph, heads={1: (0,)}, tokens=(TokenStage(1, 2, family.image_tokens),))

    def decoded(step):
        cache = DynamicCache()
        family.model(**inputs, **cached(family.model, cache))
        return [step(input_ids=word, **cached(family.model, cache)).logits for _ in range(3)]

    with obeying(family.model, graph, plan):
        expected = decoded(family.model)
        compiled = torch.compile(family.model, fullgraph=True, dynamic=True, backend="eager")
        got = decoded(compiled)
    for one, other in zip(got, expected, strict=True):
        assert close(one, other)


@torch.no_grad()
def test_a_second_prompt_under_a_token_stage_is_scored_by_itself(llava):
    """What was padding in the first prompt must not be taken for padding of the second."""
    family, graph = llava
    plan = plan_of(graph, tokens=(TokenStage(2, 5, 16, "fastv"),))
    long, short = family.inputs(batch=2, after=(6, 3)), family.inputs(batch=2, seed=1, after=(2, 1))
    with obeying(family.model, graph, plan):
        expected = family.model(**short).logits
        family.model(**long)
        assert torch.equal(family.model(**short).logits, expected)


def test_plans_may_change_in_and_out_of_inference_mode(llava):
    family, graph = llava
    inputs, session = family.inputs(), session_on(family.model, graph)
    some = [plan_of(graph, mlp={1: kept}, heads={1: (1,)}) for kept in ((0, 2, 5), (1, 4, 6))]
    with torch.inference_mode(), session.under(some[0]):
        family.model(**inputs)
    with torch.no_grad(), session.under(some[1]):
        found = family.model(**inputs).logits
    with torch.no_grad(), obeying(family.model, graph, some[1]):
        assert close(found, family.model(**inputs).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_stage_may_be_scored_by_a_layer_that_ran_before_another_stage(llava, side):
    """No layer between them runs: a token that is left has its own score, and no other's.

    So the second stage leaves what it would leave of all tokens.
    """
    family, graph = llava
    batch = family.inputs(batch=2, before=(3, 5), after=(6, 2), padding_side=side)
    second, logits = TokenStage(3, 4, 16, "fastv"), []
    for tokens in ((TokenStage(1, 9, 16, "fastv"), second), (second,)):
        plan = plan_of(graph, layers_off=(1, 2), tokens=tokens)
        with obeying(family.model, graph, plan):
            logits.append(family.model(**batch).logits)
    assert close(*logits)
