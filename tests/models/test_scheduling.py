"""Schedulers: the token put in, the plan made in mid-prompt, and what obeys it."""

import functools
import json
from contextlib import ExitStack
from itertools import product

import pytest
import torch
from families import FAMILIES, IMAGE
from grouped import with_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from restored import same_state, snapshot

from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.ir.structure import residual_branches
from planner.models.running.kv_cache import cache_argument, kv_bytes
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.scheduling import (
    Scheduled,
    Scheduler,
    UnitSwitches,
    layout_of,
    load_scheduler,
    save_scheduler,
)
from planner.models.scheduling.budget_features import sinusoid
from planner.models.scheduling.insertion import Insertion, end_of_prompt
from planner.models.scheduling.scheduler import LatencyEncoder
from planner.plan import TokenStage
from planner.planning.budgets import Budget
from planner.planning.catalog import find_model
from planner.planning.graph_cache import lowered_graph

RELATIVE = 1e-5


def close(actual, expected):
    return (actual - expected).norm() <= RELATIVE * expected.norm()


def scheduler_of(graph, switches, seed=0):
    """One whose plans differ from sample to sample."""
    torch.manual_seed(seed)
    scheduler = Scheduler.of(graph, switches)
    scheduler.head.weight.data.normal_()
    return scheduler.eval()


# -- the latency encoder ---------------------------------------------------------------------------


def test_the_sinusoid_is_the_formula():
    levels = torch.tensor([0, 3, 16])
    found = sinusoid(levels, 16)
    assert found.shape == (3, 256)
    for row, k in zip(found.double(), levels.tolist(), strict=True):
        for i in (0, 1, 77, 127):
            angle = torch.tensor(2 * torch.pi * k / 17 * 10000 ** (-i / 128), dtype=torch.float64)
            assert abs(row[i] - angle.sin()) < 1e-6
            assert abs(row[128 + i] - angle.cos()) < 1e-6


def test_every_budget_has_a_token_of_its_own():
    tokens = LatencyEncoder(32, 16)(torch.arange(17))
    assert tokens.shape == (17, 32)
    assert torch.pdist(tokens).min() > 0


# -- putting a token in, and taking it out ---------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_insertion_is_what_lists_do(data):
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    at = data.draw(st.lists(st.integers(1, tokens), min_size=batch, max_size=batch))
    insertion = Insertion(torch.tensor(at))
    hidden, token = torch.randn(batch, tokens, 4), torch.randn(batch, 4)
    longer = insertion.into_hidden(hidden, token)
    known = insertion.into_known(torch.arange(tokens).expand(batch, -1), -1)
    positions = insertion.into_positions(torch.arange(tokens)[None] + 5)
    back = insertion.out_of(longer)
    assert torch.equal(insertion.take(longer), token)
    for row, place in enumerate(at):
        rows = [*hidden[row, :place], token[row], *hidden[row, place:]]
        assert torch.equal(longer[row], torch.stack(rows))
        kept = list(range(tokens))
        assert known[row].tolist() == [*kept[:place], -1, *kept[place:]]
        assert positions[row].tolist() == [5 + i for i in range(tokens + 1)]
        assert torch.equal(back[row, place - 1], token[row])
        others = [i for i in range(tokens) if i != place - 1]
        assert torch.equal(back[row, others], hidden[row, others])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_inserted_token_is_seen_by_what_follows_it(data):
    batch, tokens = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    at = data.draw(st.lists(st.integers(1, tokens), min_size=batch, max_size=batch))
    additive = data.draw(st.booleans())
    seen = torch.rand(batch, 1, tokens, tokens) < 0.6
    mask = seen
    if additive:
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    longer = Insertion(torch.tensor(at)).into_mask(mask, True)
    longer = longer if not additive else longer == 0
    for row, place in enumerate(at):
        old = [i for i in range(tokens + 1) if i != place]
        assert torch.equal(longer[row, 0][old][:, old], seen[row, 0])
        assert torch.equal(longer[row, 0, place][old], seen[row, 0, place - 1])
        assert longer[row, 0, :, place].tolist() == [i >= place for i in range(tokens + 1)]


def test_the_end_of_a_prompt_is_behind_its_last_token():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert end_of_prompt(mask, 3, 4, mask.device).tolist() == [4, 2, 4]
    assert end_of_prompt(None, 2, 4, mask.device).tolist() == [4, 4]


# -- from logits to plans --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    family = FAMILIES["llava"]()
    return family, lower_model(family.model, "llava")


@pytest.fixture(scope="module")
def wide():
    """Four KV groups, so that a quarter of them is a unit."""
    return with_groups("llava")


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_plans_use_a_budget_up_and_never_pass_it(wide, data):
    _, graph = wide
    layout = layout_of(data.draw(st.sampled_from(["adallava-l", "adallava-h"])), graph)
    batch = data.draw(st.integers(1, 4))
    limits = torch.tensor(
        data.draw(st.lists(st.integers(0, layout.steps), min_size=batch, max_size=batch))
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(batch, layout.size).round(decimals=data.draw(st.sampled_from([0, 3])))
    taken = layout.decide(logits, limits)
    assert [layout.spent(row) for row in taken] == limits.tolist()
    again = layout.decide(logits, limits)
    assert torch.equal(taken, again)


def test_units_are_the_best_of_the_layer_that_has_the_best(wide):
    _, graph = wide
    layout = layout_of("adallava-h", graph)
    assert isinstance(layout, UnitSwitches)
    assert (layout.heads, layout.rank, layout.size, layout.steps) == (4, 1, 16, 8)
    logits = torch.zeros(1, 16)
    logits[0, 8 + 2] = 5  # second layer, head 2
    logits[0, 8 + 4 + 1] = 1  # and its group 1
    logits[0, 3] = 4  # first layer, head 3
    first = layout.decide(logits, torch.tensor([1]))[0].nonzero().flatten().tolist()
    assert first == [10, 13]
    both = layout.decide(logits, torch.tensor([2]))[0].nonzero().flatten().tolist()
    assert both == [3, 4, 10, 13]
    plan = layout.plan(layout.decide(logits, torch.tensor([1]))[0], layout.example(8))
    assert plan.layers_off == (2,)
    assert (plan.heads, plan.mlp) == ({3: (2,)}, {3: (1,)})
    assert layout.example(8).is_dense


def test_units_of_published_sizes_are_the_authors():
    """8 heads and 8 groups at 7B and at 13B, where a layer has 40."""
    for name, units, levels in (("llava-7b", 64, 128), ("llava-13b", 100, 200)):
        graph = lowered_graph(find_model(name))[0]
        layout = layout_of("adallava-h", graph)
        assert (layout.rank, layout.steps) == (8, units)
        for budget in (0.5, 0.6, 0.77, 0.85, 1):
            assert layout.limit(Budget.of(budget)) == int(levels * budget) - levels + units
        sites = [*layout.columns[layout.first].sites]
        assert sites[1].bounds[-1] == graph.sites_by_name["mlp.0"].lanes


@pytest.mark.parametrize(
    ("name", "first", "steps", "limit"),
    [
        ("adallava-l:first=1", 1, 3, 2),
        ("adallava-h:unit=4,first=1", 1, 3, 2),
        ("adallava-h:unit=2", 2, 4, 2),
        ("layers,mlp:groups=3,first=3", 3, None, None),
        ("layers:first=1", 1, None, None),
    ],
)
def test_switches_begin_where_they_are_told_to(wide, tmp_path, name, first, steps, limit):
    _, graph = wide
    layout = layout_of(name, graph)
    assert sorted(layout.columns) == [*range(first, 4)]
    if steps is not None:
        assert (layout.steps, layout.limit(Budget.of(0.75))) == (steps, limit)
    save_scheduler(scheduler_of(graph, name), tmp_path)
    again = load_scheduler(tmp_path, graph).layout
    assert (again.name, again.first) == (layout.name, first)


# -- running ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "switches"),
    [
        *product(
            ["llava", "qwen2_5_vl", "gemma3", "phi"],
            ["adallava-l", "adallava-h", "adallava-h:unit=2,first=1"],
        ),
        # Its decoder is told which tokens are of images, too.
        ("qwen3_vl", "adallava-l"),
        ("qwen3_vl", "tokens,layers,heads,mlp"),
        ("llava_onevision", "tokens,layers,heads,mlp"),
    ],
)
def test_skipping_answers_as_masking_does(name, switches):
    family, graph = with_groups(name)
    scheduler = scheduler_of(graph, switches)
    inputs = family.inputs(batch=3, before=(3, 1), after=(5, 2, 4))
    budgets = [0.5, 0.75, 1.0]
    seen = inputs["attention_mask"] == 1
    if "tokens" in switches:
        # What is computed for tokens that are left out, masked, is of no one's concern.
        seen &= inputs["input_ids"] != IMAGE
    answers = []
    for mask in (False, True):
        scheduled = Scheduled(family.model, graph, scheduler, mask=mask)
        with scheduled.using(budgets):
            logits = family.model(**inputs).logits
            tokens = family.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answers.append((logits[seen], tokens, scheduled.taken))
    assert torch.equal(answers[0][2], answers[1][2])
    assert close(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


@torch.no_grad()
def test_the_token_is_in_the_cache_and_positions_go_on(tiny):
    """A cached answer against one pass with the token in the middle, where training puts it."""
    family, graph = tiny
    scheduled = Scheduled(family.model, graph, scheduler_of(graph, "adallava-l"))
    inputs = family.inputs(batch=2, after=(5, 3))
    prompt = inputs["input_ids"].shape[1]
    with scheduled.using(0.75):
        run = family.model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            suppress_tokens=[IMAGE],
        )
        taken = scheduled.taken
        cache = run.past_key_values
        assert cache.layers[0].keys.shape[2] == prompt + 1 + 3
        assert cache.get_seq_length() == prompt + 3
        scheduled.at = torch.full((2,), prompt)
        tokens, mask = run.sequences, inputs["attention_mask"]
        mask = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = family.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            pixel_values=inputs["pixel_values"],
        ).logits
        assert torch.equal(scheduled.taken, taken)
        assert close(whole[:, prompt - 1 : -1], torch.stack(run.logits, 1))
    # Layers that are off for both samples hold nothing, the token included.
    off = ~taken.any(0)
    kept = [kv_bytes_of(cache.layers[2 + n]) for n in range(2)]
    assert [size == 0 for size in kept] == off.tolist()
    assert kv_bytes(cache) > 0


def cached(family, cache):
    """A cache as an argument, under the name that the model has for it."""
    return {cache_argument(family.model.forward): cache}


def kv_bytes_of(layer):
    stores = [part.store for part in layer.parts]
    return sum(s.keys.nbytes for s in stores if s is not None and s.is_initialized)


@torch.no_grad()
def test_prompts_of_several_conversations_take_turns(tiny):
    family, graph = tiny
    scheduled = Scheduled(family.model, graph, scheduler_of(graph, "adallava-l", seed=3))
    first, second = family.inputs(seed=1), family.inputs(seed=2)
    word = torch.tensor([[7]])

    def steps(inputs, caches):
        out = family.model(**inputs, use_cache=True)
        caches.append(out.past_key_values)
        return [out.logits[:, -1]]

    with scheduled.using(0.75):
        alone = []
        for inputs in (first, second):
            caches = []
            logits = steps(inputs, caches)
            for _ in range(2):
                out = family.model(input_ids=word, **cached(family, caches[0]))
                logits.append(out.logits[:, -1])
            alone.append(torch.stack(logits))
        caches = []
        mixed = [steps(first, caches), steps(second, caches)]
        for _ in range(2):
            for number in (0, 1):
                out = family.model(input_ids=word, **cached(family, caches[number]))
                mixed[number].append(out.logits[:, -1])
    for expected, found in zip(alone, mixed, strict=True):
        assert close(torch.stack(found), expected)


@torch.no_grad()
def test_a_second_question_keeps_the_first_plan(tiny):
    family, graph = tiny
    scheduled = Scheduled(family.model, graph, scheduler_of(graph, "adallava-l"))
    inputs = family.inputs()
    with scheduled.using(0.75):
        run = family.model.generate(
            **inputs,
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            suppress_tokens=[IMAGE],
        )
        decided = len(scheduled.decisions)
        history = torch.cat([run.sequences, torch.tensor([[9, 11, 8]])], 1)
        again = {**inputs, "input_ids": history, "attention_mask": torch.ones_like(history)}
        again.pop("pixel_values")
        more = family.model.generate(
            **again,
            **cached(family, run.past_key_values),
            max_new_tokens=3,
            do_sample=False,
            suppress_tokens=[IMAGE],
        )
        assert len(scheduled.decisions) == decided
        # In one pass, with the token where the first question ended.
        scheduled.at = torch.tensor([inputs["input_ids"].shape[1]])
        whole = family.model(input_ids=more[:, :-1], pixel_values=inputs["pixel_values"]).logits
    start = history.shape[1]
    assert torch.equal(whole[:, start - 1 :].argmax(-1), more[:, start:])


@torch.no_grad()
def test_beams_and_samples_run(tiny):
    family, graph = tiny
    scheduled = Scheduled(family.model, graph, scheduler_of(graph, "adallava-l"))
    inputs = family.inputs(batch=2, after=(5, 3))
    with scheduled.using([0.5, 1.0]):
        beams = family.model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
        assert scheduled.taken.shape == (6, 2)
        sampled = family.model.generate(**inputs, max_new_tokens=4, do_sample=True)
    assert beams.shape == sampled.shape == (2, inputs["input_ids"].shape[1] + 4)


@torch.no_grad()
@pytest.mark.parametrize("mask", [False, True])
def test_tokens_are_dropped_in_front_of_the_switches(tiny, mask):
    family, graph = tiny
    scheduled = Scheduled(family.model, graph, scheduler_of(graph, "adallava-l"), mask=mask)
    inputs = family.inputs(batch=2, after=(5, 3))
    stage = TokenStage(2, 6, family.image_tokens, "fastv")
    with scheduled.using(1.0, (stage,)):
        cache = family.model(**inputs, use_cache=True).past_key_values
    dropped = family.image_tokens - 6
    first, last = cache.layers[1], cache.layers[3]
    assert first.keys.shape[2] - last.keys.shape[2] == dropped


def test_detaching_gives_the_model_back(tiny):
    family, graph = tiny
    inputs = family.inputs()
    with torch.no_grad():
        stock = family.model(**inputs).logits
        before = snapshot(family.model)
        with Scheduled(family.model, graph, scheduler_of(graph, "adallava-l")).using(0.75):
            assert not close(family.model(**inputs).logits, stock)
        assert torch.equal(family.model(**inputs).logits, stock)
    assert same_state(before, snapshot(family.model))


@torch.no_grad()
def test_what_cannot_be_done_is_refused(tiny):
    family, graph = tiny
    scheduled = Scheduled(family.model, graph, scheduler_of(graph, "adallava-l"))
    inputs = family.inputs(batch=3)
    with scheduled.using([0.5, 1.0]), pytest.raises(InputError, match="2 budgets for a batch of 3"):
        family.model(**inputs)
    with pytest.raises(InputError, match="counts units"), scheduled.using("kv=1MiB"):
        pass
    behind = TokenStage(3, 6, family.image_tokens)
    with pytest.raises(InputError, match="behind the first switch"), scheduled.using(1, (behind,)):
        pass
    with scheduled.using(0.75), pytest.raises(InputError, match="static cache"):
        family.model.generate(**family.inputs(), cache_implementation="static", max_new_tokens=2)
    cache = family.model(**family.inputs(), use_cache=True).past_key_values
    with scheduled.using(0.75), pytest.raises(InputError, match="without the scheduler"):
        family.model(input_ids=torch.tensor([[5]]), **cached(family, cache))
    for name, words in (
        ("adallava-h:unit=3", "units of 3 heads do not divide the 2 KV groups"),
        ("adallava-h:unit=0", "units of 0 heads"),
        ("adallava-l:unit=2", "no field 'unit'"),
        ("adallava-l:first=0", "cannot begin at layer 0"),
        ("heads,mlp:first=4", "cannot begin at layer 4"),
        ("heads,mlp:first=1,first=1", "should end in"),
    ):
        with pytest.raises(InputError, match=words):
            layout_of(name, graph)
    for switches in ("adallava-l", "adallava-h"):
        layout = layout_of(switches, graph)
        assert layout.limit(Budget.of(0.5)) == 0
        with pytest.raises(InputError, match=r"cannot keep to less than 0\.5$"):
            layout.limit(Budget.of(0.49))
    with pytest.raises(InputError, match="unknown switches"):
        layout_of("adallava-x", graph)


def test_layer_gates_act_on_attention_and_mlp_apart(tiny):
    """The gradients of gates, and of all weights, are those of AdaLLaVA's code."""
    family, graph = tiny
    model, inputs = family.model, family.inputs(batch=2, after=(5, 3))
    worth = torch.randn(2, inputs["input_ids"].shape[1], 1, generator=torch.manual_seed(3))
    found = []
    for naive in (False, True):
        gates = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        layers = {2 + column: gates[:, column] for column in range(2)}
        with ExitStack() as stack:
            if naive:
                for number, gate in layers.items():
                    layer = model.get_decoder().layers[number]
                    stack.callback(layer.__dict__.pop, "forward")
                    layer.forward = functools.partial(gated_layer, layer, gate[:, None, None])
            else:
                stack.enter_context(MaskedExecutor(model, graph).using(Gates(layers)))
            logits = model(**inputs).logits
        weights = [*model.get_decoder().layers[2].parameters()]
        found.append([logits, *torch.autograd.grad((logits * worth).sum(), [gates, *weights])])
    for ours, theirs in zip(*found, strict=True):
        assert close(ours, theirs)


def gated_layer(layer, gate, hidden_states, **kwargs):
    inner, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + gate * inner
    return hidden_states + gate * layer.mlp(layer.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("llava", ("self_attn.o_proj", "mlp.down_proj")),
        ("gemma3", ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("phi", ("self_attn.dense", "mlp.fc2")),
    ],
)
def test_a_layer_s_branches_are_what_it_adds(name, branches):
    _, graph = with_groups(name)
    for layer in (0, 3):
        site = graph.sites_by_name[f"layer.{layer}"]
        found = {path.removeprefix(f"{site.module}.") for path in residual_branches(graph, site)}
        assert found == set(branches)


# -- on disk ---------------------------------------------------------------------------------------


def test_a_scheduler_comes_back_from_its_folder(tiny, tmp_path):
    _, graph = tiny
    scheduler = scheduler_of(graph, "adallava-l")
    save_scheduler(scheduler, tmp_path)
    again = load_scheduler(tmp_path, graph)
    for one, other in zip(scheduler.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.layout == scheduler.layout


@pytest.mark.parametrize("fault", ["missing", "json", "weights", "model", "format", "nan"])
def test_a_broken_folder_is_one_sentence(tiny, tmp_path, fault):
    _, graph = tiny
    scheduler = scheduler_of(graph, "adallava-l")
    if fault == "nan":
        scheduler.head.weight.data[0] = torch.nan
    save_scheduler(scheduler, tmp_path)
    description = tmp_path / "scheduler.json"
    if fault == "missing":
        description.unlink()
    elif fault == "json":
        description.write_text(description.read_text()[:20])
    elif fault == "weights":
        weights = tmp_path / "scheduler.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    elif fault in ("model", "format"):
        changed = json.loads(description.read_text())
        changed |= {"fingerprint": "0" * 8} if fault == "model" else {"format": 9}
        description.write_text(json.dumps(changed))
    with pytest.raises(InputError) as caught:
        load_scheduler(tmp_path, graph)
    assert "\n" not in str(caught.value)
