"""IVTP: patches dropped inside the tower, tokens dropped in the decoder, against loops by hand."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import CLIP, FAMILIES, IMAGE, PLAIN_TOKENS, _build, _plain, cached
from plans import plan_of
from restored import same_state, snapshot
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import planner
from planner.api import prompt_of
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.running.skipping import obeying, session_on
from planner.models.tokens.selectors import LayerAttention, mark_tokens, select_patches
from planner.planning.compiler import plan_graph
from planner.planning.plan_costs import PlanCosts
from planner.planning.request import Request
from planner.planning.selectors import parse, selector_of, stages_of

PATCHES, TOWER_LAYERS = 16, 5
SELECTORS = [
    "ivtp:tower=0.5,decoder=0.4,k=2/3,group=2",
    "ivtp:tower=0.3,decoder=0.5,k=1,group=1",
    "ivtp:tower=0.6,decoder=0.2,k=3,group=3,positions=original",
]


def family(layers=TOWER_LAYERS + 1):
    """A LLaVA whose tower has some layers, of which its features skip the last."""
    tower = CLIP | {"num_hidden_layers": layers}
    return _build("llava", {"model_type": "llama"}, tower, _plain(32), PATCHES, **PLAIN_TOKENS)


@pytest.fixture(scope="module")
def deep():
    """(family, graph) of a model whose every product the FLOP counter sees."""
    built = family()
    graph = lower_model(built.model, "deep")
    built.model.set_attn_implementation("eager")
    return built, graph


def alone(inputs, row, images):
    """One sample of a batch, without its padding."""
    where = inputs["attention_mask"][row].bool()
    pixels = inputs["pixel_values"][images * row : images * (row + 1)]
    return {"input_ids": inputs["input_ids"][row, where][None], "pixel_values": pixels}


# -- the rules ------------------------------------------------------------------------------------


def rollout(matrices):
    """The product of (A + I) / 2, the last layer's first; (tokens, tokens)."""
    product = np.eye(len(matrices[0]))
    for matrix in matrices:
        product = (matrix + np.eye(len(matrix))) / 2 @ product
    return product


def softmax(logits):
    exponent = np.exp(logits - logits.max(-1, keepdims=True))
    return exponent / exponent.sum(-1, keepdims=True)


def best(scores, count):
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("keep", [1, 5, 9])
def test_patches_are_those_of_the_rollout(layers, keep):
    rng = np.random.default_rng(layers)
    queries, keys = rng.normal(size=(2, layers, 3, 2, 10, 4)) * 2
    valid = torch.ones(3, 10, dtype=torch.bool)
    everything = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    given = [
        LayerAttention(torch.from_numpy(q), torch.from_numpy(k), valid, mask=everything)
        for q, k in zip(queries, keys, strict=True)
    ]
    chosen = select_patches(parse("ivtp").tower_part, given, keep)
    for run in range(3):
        each = [
            np.mean([softmax(q[run, h] @ k[run, h].T / 2) for h in range(2)], axis=0)
            for q, k in zip(queries, keys, strict=True)
        ]
        assert chosen[run].tolist() == best(rollout(each)[0, 1:], keep)


def test_ties_go_to_the_first_patches():
    even = torch.zeros(2, 2, 10, 4)
    given = LayerAttention(even, even, torch.ones(2, 10, dtype=torch.bool))
    chosen = select_patches(parse("ivtp").tower_part, [given], 4)
    assert chosen.tolist() == [[0, 1, 2, 3]] * 2


def fitting(states, image):
    """Places of one sample's text tokens that fit its picture."""
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    picture = unit[image].sum(0)
    text = list(range(image.nonzero()[0].max(initial=-1) + 1, len(states)))
    fits = [unit[n] @ picture / np.linalg.norm(picture) for n in text]
    return [n for n, fit in zip(text, fits) if fit >= np.mean(fits) - 1e-9] or [len(states) - 1]


@pytest.mark.parametrize("behind", [0, 1, 7])
def test_the_instruction_is_the_text_that_fits_the_picture(behind):
    rng = np.random.default_rng(behind)
    states, image = rng.normal(size=(2, 12 + behind, 6)), np.zeros((2, 12 + behind), dtype=bool)
    image[0, 3:7] = image[0, 9:12] = image[1, 5:12] = True
    valid = np.ones_like(image)
    valid[1, :4] = False
    marks = mark_tokens(parse("ivtp"), *map(torch.from_numpy, (states, image, valid)))
    for row in range(2):
        assert marks[row].nonzero().flatten().tolist() == fitting(states[row], image[row])


def test_counts_fall_by_the_same_share_at_every_stage():
    (*stages,) = stages_of("ivtp", 576, 576)
    assert [(s.layer, s.keep) for s in stages] == [(0, 192), (3, 146), (6, 111), (9, 84), (12, 64)]
    assert parse("ivtp:tower=0.01,decoder=0.01").counts(16) == (1, 1, 1, 1, 1)
    assert parse("ivtp:tower=1,decoder=1").counts(16) == (16,) * 5
    # Pictures are pruned one by one in the tower, together in the decoder; line ends stay.
    assert stages_of("ivtp:tower=0.5,decoder=0.5,k=2", 48, 16)[-1].keep == 12
    assert stages_of("ivtp:tower=0.5,decoder=1,k=2", 24, 24, (5, 4))[0].keep == 14


# -- whole models ---------------------------------------------------------------------------------


def attention_of(layer, hidden, heads, groups, rotation=None):
    """Mean over heads of what a layer attends to, (batch, tokens, tokens), by numpy."""
    normed = (layer.layer_norm1 if rotation is None else layer.input_layernorm)(hidden)
    block = layer.self_attn
    query = block.q_proj(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = block.k_proj(normed).unflatten(-1, (groups, -1)).transpose(1, 2)
    if rotation is not None:
        query, key = apply_rotary_pos_emb(query, key, *rotation)
    key = key.repeat_interleave(heads // groups, 1)
    logits = (query @ key.mT / query.shape[-1] ** 0.5).numpy()
    if rotation is not None:
        logits[..., ~np.tri(logits.shape[-1], dtype=bool)] = -np.inf
    return softmax(logits).mean(1)


def tower_by_hand(model, pixels, selector):
    """(features, patches that they are of), run by run."""
    tower, left = model.model.vision_tower, torch.arange(PATCHES).repeat(len(pixels), 1)
    hidden, seen = tower.pre_layrnorm(tower.embeddings(pixels)), []
    ends = range(selector.group, TOWER_LAYERS, selector.group)
    for number, layer in enumerate(tower.encoder.layers[:TOWER_LAYERS]):
        if number in ends:
            step = ends.index(number) + 1
            keep = round(PATCHES * selector.tower ** (step / len(ends)))
            chosen = [
                best(rollout([m[run] for m in seen[-selector.group :]])[0, 1:], keep)
                for run in range(len(pixels))
            ]
            hidden = torch.stack([h[[0, *(1 + np.array(c))]] for h, c in zip(hidden, chosen)])
            left = torch.stack([patches[c] for patches, c in zip(left, chosen)])
            seen = []
        seen.append(attention_of(layer, hidden, 2, 2))
        hidden = layer(hidden, None)
    return hidden[:, 1:], left


def by_hand(model, inputs, text):
    """Logits of one sample's last token, and image tokens left at each stage."""
    selector = parse(text)
    features, patches = tower_by_hand(model, inputs["pixel_values"], selector)
    ids = inputs["input_ids"][0]
    image = (ids == IMAGE).nonzero().flatten().view(-1, PATCHES)
    hidden = model.get_input_embeddings()(ids).clone()
    slots = image.gather(1, patches)
    if selector.renumbers:
        slots = image[:, : slots.shape[1]]
    hidden[slots] = model.model.multi_modal_projector(features)
    there = sorted({*range(len(ids))} - {*image.flatten().tolist()} | {*slots.flatten().tolist()})
    hidden, places = hidden[None, there], torch.tensor(there)
    marks = fitting(hidden[0].numpy(), (ids[there] == IMAGE).numpy())
    marks = {there[n] for n in marks}
    entered = int((ids[there] == IMAGE).sum())
    decoder, seen, counts = model.model.language_model, [], [entered]
    for number, layer in enumerate(decoder.layers):
        if number in selector.k:
            step = selector.k.index(number) + 1
            keep = max(1, round(entered * selector.decoder ** (step / len(selector.k))))
            rows = rollout([m[0] for m in seen[-selector.group :]])
            instruction = [n for n, place in enumerate(places.tolist()) if place in marks]
            is_image = (ids[places] == IMAGE).numpy()
            scores = np.where(is_image, rows[instruction].mean(0), -1)
            stay = sorted({*np.flatnonzero(~is_image).tolist(), *best(scores, keep)})
            hidden, places, seen = hidden[:, stay], places[stay], []
            counts.append(keep)
        positions = torch.arange(len(places)) if selector.renumbers else places
        rotation = decoder.rotary_emb(hidden, positions[None])
        seen.append(attention_of(layer, hidden, 4, 2, rotation))
        causal = torch.full((len(places),) * 2, torch.finfo(hidden.dtype).min).triu(1)
        hidden = layer(
            hidden,
            attention_mask=causal[None, None],
            position_ids=positions[None],
            position_embeddings=rotation,
        )
    return model.lm_head(decoder.norm(hidden))[0, -1], counts


def close(actual, expected, relative=1e-5):
    return (actual - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", SELECTORS)
@torch.no_grad()
def test_a_ragged_batch_equals_samples_by_hand(deep, text, side):
    family, graph = deep
    inputs = family.inputs(3, 3, before=(3, 6, 1), after=(5, 2, 9), images=2, padding_side=side)
    stock = family.model(**inputs).logits
    before = snapshot(family.model)
    session = session_on(family.model, graph)
    samples = [by_hand(family.model, alone(inputs, row, 2), text) for row in range(3)]
    plan = plan_of(graph, tokens=stages_of(text, 2 * PATCHES, PATCHES))
    with session.under(plan):
        output = family.model(**inputs, use_cache=True)
        kept = session.implementation.kept_image_tokens
        for row, (expected, counts) in enumerate(samples):
            where = inputs["attention_mask"][row].nonzero()[-1]
            assert close(output.logits[row, where][0], expected)
            assert [of[row] for of in kept.values()] == counts
        one = family.model(**alone(inputs, 1, 2), use_cache=True).past_key_values
    assert torch.equal(family.model(**inputs).logits, stock)
    words = int((alone(inputs, 1, 2)["input_ids"] != IMAGE).sum())
    left = {stage.layer: stage.keep for stage in plan.tokens}
    expected = [left[max(k for k in left if k <= layer)] for layer in range(graph.layers)]
    assert [layer.keys.shape[2] - words for layer in one.layers] == expected
    session.close()
    assert same_state(before, snapshot(family.model))


@pytest.mark.parametrize("text", SELECTORS)
@pytest.mark.parametrize("images", [1, 2])
@torch.no_grad()
def test_a_plan_costs_what_runs(deep, text, images):
    """All of it: fewer tokens in the tower, in the projector and in the decoder, and choosing."""
    family, graph = deep
    inputs = family.inputs(2, images=images)
    words = inputs["input_ids"].shape[1] - images * PATCHES
    request = Request(
        "deep", 1.0, switches="tokens", tokens=text, image_tokens=images * PATCHES,
        text_tokens=words, new_tokens=0, batch=2,
    )  # fmt: skip
    plan = plan_graph(graph, request).plan
    with session_on(family.model, graph).under(plan), FlopCounterMode(display=False) as counter:
        family.model(**inputs, logits_to_keep=1)
    assert counter.get_total_flops() == plan.cost["flops"]["plan"]
    with FlopCounterMode(display=False) as counter:
        family.model(**inputs, logits_to_keep=1)
    assert counter.get_total_flops() == plan.cost["flops"]["base"]


@torch.no_grad()
def test_it_composes_with_layers_heads_and_mlps(deep):
    family, graph = deep
    inputs = family.inputs(2, before=(3, 6))
    words = inputs["input_ids"].shape[1] - PATCHES
    request = Request(
        "deep", 0.55, tokens="ivtp:tower=0.7,decoder=0.5,k=2,group=1", image_tokens=PATCHES,
        text_tokens=words, new_tokens=0, batch=2,
    )  # fmt: skip
    plan = plan_graph(graph, request).plan
    assert plan.tokens
    assert plan.layers_off or plan.heads or plan.mlp
    with session_on(family.model, graph).under(plan):
        with FlopCounterMode(display=False) as counter:
            together = family.model(**inputs, logits_to_keep=1).logits
        assert counter.get_total_flops() <= plan.cost["flops"]["plan"]
        for row in range(2):
            single = family.model(**alone(inputs, row, 1), logits_to_keep=1).logits
            assert close(together[row], single[0])


@torch.no_grad()
def test_samples_of_a_batch_may_have_other_heads(deep):
    family, graph = deep
    inputs = family.inputs(3)
    stages = stages_of("ivtp:tower=0.5,decoder=0.5,k=2,group=2", PATCHES, PATCHES)
    plans = [
        plan_of(graph, tokens=stages, heads={0: (1,)}),
        plan_of(graph, tokens=stages, heads={1: ()}),
        plan_of(graph, tokens=stages, layers_off=(0,)),
    ]
    session = session_on(family.model, graph)
    with session.under(plans):
        together = family.model(**inputs, logits_to_keep=1).logits
    for row, plan in enumerate(plans):
        with session.under(plan):
            single = family.model(**alone(inputs, row, 1), logits_to_keep=1).logits
        assert close(together[row], single[0])


def test_a_second_question_reads_the_same_cache(deep):
    family, graph = deep
    inputs = family.inputs(2, before=(3, 6))
    question = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    plan = plan_of(graph, tokens=stages_of(SELECTORS[0], PATCHES, PATCHES), layers_off=(3,))
    with obeying(family.model, graph, plan):
        first = family.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 11, dtype=torch.long)], 1)
        asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        second = family.model.generate(**asked, **cached(family.model, first.past_key_values))
    assert second.shape[1] == ids.shape[1] + 5


def test_budgets_hold_for_prompts_whatever_ran_before():
    """What encoders spend is counted once for inputs of some sizes, as the base model spends it."""
    built = family()
    built.model.set_attn_implementation("eager")
    inputs = built.inputs(1, 4)
    with FlopCounterMode(display=False) as counter:
        built.model(**inputs, logits_to_keep=1)
    base = counter.get_total_flops()
    options = {"utilities": "uniform", "switches": "heads,mlp", "text_tokens": 8}
    for tokens in (SELECTORS[0], "random:keep=8", SELECTORS[1]):
        model = planner.compile(built.model, 0.7, tokens=tokens, **options)
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                model(**inputs, logits_to_keep=1)
            cost = planner.plan_of(model).cost["flops"]
            assert cost["base"] == base
            assert counter.get_total_flops() <= cost["plan"] <= 0.7 * base
        prompt = prompt_of(model, inputs)
        known = PlanCosts(session_on(model).graph, replace(prompt, logits=1))
        assert known.of(planner.plan_of(model))["flops"] == cost
    planner.restore(built.model)


@torch.no_grad()
def test_a_copy_of_a_model_drops_patches_of_its_own(deep):
    family, graph = deep
    inputs = family.inputs(2)
    plan = plan_of(graph, tokens=stages_of(SELECTORS[0], PATCHES, PATCHES))
    with obeying(family.model, graph, plan):
        expected = family.model(**inputs).logits
        other = copy.deepcopy(family.model)
    assert torch.equal(other(**inputs).logits, expected)


def test_gradients_reach_the_tower_through_patches_that_are_left(deep):
    family, graph = deep
    inputs = family.inputs(2)
    plan = plan_of(graph, tokens=stages_of(SELECTORS[0], PATCHES, PATCHES))
    with obeying(family.model, graph, plan):
        loss = family.model(**inputs, labels=inputs["input_ids"]).loss
        (gradient,) = torch.autograd.grad(
            loss, [family.model.model.vision_tower.encoder.layers[0].self_attn.v_proj.weight]
        )
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "text",
    [
        SELECTORS[0],
        "sparsevlm:after=1,keep=5",
        "fastv:k=2,r=0.7",
        "dart:keep=8,k=2",
        "pyramiddrop:k=1/2,ratio=0.5/0.25",
    ],
)
@torch.no_grad()
def test_answers_that_are_learned_do_not_choose(deep, text):
    family, graph = deep
    inputs = {k: v for k, v in family.inputs(2).items() if k != "attention_mask"}
    prompt = inputs["input_ids"].shape[1]
    answer = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([inputs["input_ids"], answer], 1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    with obeying(family.model, graph, plan_of(graph, tokens=stages_of(text, PATCHES, PATCHES))):
        asked = family.model(**inputs).logits[:, -1]
        learned = family.model(**inputs | {"input_ids": ids}, labels=labels).logits
        guessed = family.model(**inputs | {"input_ids": ids}).logits
        # A template's end of a turn stands behind the answer, and no loss is of it.
        ends = torch.full_like(answer[:, :2], 7)
        ended = family.model(
            **inputs | {"input_ids": torch.cat([ids, ends], 1)},
            labels=torch.cat([labels, torch.full_like(ends, -100)], 1),
        ).logits
    assert close(learned[:, prompt - 1], asked)
    assert close(ended[:, prompt - 1], asked)
    assert not close(guessed[:, prompt - 1], asked)


# -- what it cannot do ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ivtp:tower=0", "tower is a share above 0, up to 1"),
        ("ivtp:decoder=1.5", "decoder is a share above 0, up to 1"),
        ("ivtp:k=0/2", "k is layers from 1 on, ascending"),
        ("ivtp:k=4/2", "k is layers from 1 on, ascending"),
        ("ivtp:group=0", "group is a count from 1 on"),
        ("ivtp:positions=odd", "positions is contiguous or original"),
        ("ivtp:keep=64", "ivtp has no field 'keep'"),
    ],
)
def test_bad_arguments_are_one_sentence(text, message):
    with pytest.raises(InputError, match=message):
        parse(text)


def test_a_tower_that_it_cannot_work_in_is_refused_before_anything_runs(deep):
    _, graph = deep
    with pytest.raises(InputError, match="only 5 of this one make its features: give a smaller"):
        plan_graph(graph, Request("deep", 1.0, tokens="ivtp:k=2,group=5"))
    with pytest.raises(InputError, match="before decoder layer 12"):
        plan_graph(graph, Request("deep", 1.0, tokens="ivtp:group=2"))


@pytest.mark.parametrize(
    ("built", "match"),
    [
        (FAMILIES["phi"], "CLS token, which this vision tower does not have"),
        (FAMILIES["internvl"], "does not make one token of each patch"),
        (FAMILIES["mistral3"], "does not make one token of each patch|several layers"),
        (FAMILIES["qwen2_5_vl"], "patches cannot be dropped inside"),
    ],
)
def test_models_that_it_cannot_work_with(built, match):
    built = built()
    graph = lower_model(built.model, "other")
    request = Request("other", 1.0, tokens="ivtp:k=1,group=1")
    with pytest.raises(InputError, match=match):
        plan_graph(graph, request)
    stages = stages_of("ivtp:k=1,group=1", built.image_tokens, built.image_tokens)
    with pytest.raises(InputError, match=match):
        session_on(built.model, graph).obey(plan_of(graph, tokens=stages))


def test_a_plan_names_the_whole_selector_at_every_stage():
    stages = stages_of(SELECTORS[0], PATCHES, PATCHES)
    assert {stage.selector for stage in stages} == {SELECTORS[0]}
    assert [type(selector_of(stage)).__name__ for stage in stages] == ["IVTPTower", "IVTP", "IVTP"]
