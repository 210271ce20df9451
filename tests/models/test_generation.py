"""Everything `generate` can do, under a plan; and what is refused, in one sentence."""

import copy

import pytest
import torch
from families import IMAGE, IMAGE_END, IMAGE_START, VIDEO, cached
from plans import dense_plan, plan_of
from restored import same_state, snapshot
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planner.ir.errors import InputError
from planner.models.running.joined_cache import CachedAnswer, join
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.skipping import obeying, session_on
from planner.plan import TokenStage


def planned(graph, **more):
    """Layer 0 off, heads and neurons off here and there."""
    return plan_of(
        graph, **({"layers_off": (0,), "heads": {1: (1,), 2: ()}, "mlp": {1: (0, 3, 4)}} | more)
    )


STAGES = (TokenStage(1, 9, 16), TokenStage(3, 4, 16))


def close(actual, expected, relative=1e-5):
    return (actual - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize("stages", [(), STAGES], ids=["widths", "tokens"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["beams", "beams-returned", "sampling", "no-cache", "assisted"],
)
def test_searches(llava, options, stages):
    """A batch of two plans under a search gives what each sample gives alone."""
    family, graph = llava
    both = [planned(graph, tokens=stages), plan_of(graph, heads={3: (0,)}, tokens=stages[:1])]
    batch = 1 if "prompt_lookup_num_tokens" in options or "do_sample" in options else 2
    inputs = family.inputs(batch, before=(3, 6))
    session = session_on(family.model, graph)
    greedy = {"do_sample": False, "max_new_tokens": 16} | options
    torch.manual_seed(3)
    with session.under(both[:batch]):
        together = family.model.generate(**inputs, **greedy)
    copies = len(together) // batch
    for row in range(batch):
        where = inputs["attention_mask"][row].bool()
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        alone |= {name: inputs[name][row, where][None] for name in ("input_ids", "attention_mask")}
        torch.manual_seed(3)
        with session.under(both[row]):
            expected = family.model.generate(**alone, **greedy)
        assert torch.equal(together[row * copies : (row + 1) * copies, -16:], expected[:, -16:])
    plain = {"do_sample": False, "max_new_tokens": 16}
    if options == {"use_cache": False} or "prompt_lookup_num_tokens" in options:
        with session.under(both[:batch]):
            assert torch.equal(together, family.model.generate(**inputs, **plain))


@pytest.mark.parametrize("stages", [(), STAGES], ids=["widths", "tokens"])
def test_a_second_question_on_the_same_cache(llava, stages):
    family, graph = llava
    plan = planned(graph, tokens=stages)
    inputs = family.inputs(2, before=(3, 6))
    question = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    session = session_on(family.model, graph)
    with session.under(plan):
        first = family.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 11, dtype=torch.long)], 1)
        images = {"pixel_values": inputs["pixel_values"]}
        second = family.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **cached(family.model, first.past_key_values),
            max_new_tokens=5,
            do_sample=False,
        )
        again = family.model.generate(
            input_ids=ids, attention_mask=mask, **images, max_new_tokens=5, do_sample=False
        )
    assert torch.equal(second, again)


@torch.no_grad()
def test_a_prompt_cache_can_be_copied_and_continued(llava):
    family, graph = llava
    inputs = family.inputs()
    session = session_on(family.model, graph)
    with session.under(planned(graph, tokens=STAGES)):
        cache = DynamicCache()
        family.model(**inputs, **cached(family.model, cache))
        words = [torch.tensor([[5, 6]]), torch.tensor([[70, 8]])]
        apart = [
            family.model(input_ids=ids, **cached(family.model, copy.deepcopy(cache))).logits
            for ids in words
        ]
        family.model(input_ids=words[0], **cached(family.model, cache))
        cache.crop(-2)
        assert close(
            family.model(input_ids=words[1], **cached(family.model, cache)).logits, apart[1]
        )
    assert not close(apart[0], apart[1])


@torch.no_grad()
def test_a_second_image_in_a_later_turn(llava):
    family, graph = llava
    inputs = family.inputs(images=2)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    border = int((ids[0] == IMAGE).nonzero()[16]) - 1
    session = session_on(family.model, graph)
    with session.under(plan_of(graph, tokens=(TokenStage(1, 5, 16),), heads={2: (1,)})):
        cache = DynamicCache()
        family.model(
            input_ids=ids[:, :border], pixel_values=pixels[:1], **cached(family.model, cache)
        )
        assert cache.layers[1].keys.shape[2] == border - 11
        logits = family.model(
            input_ids=ids[:, border:], pixel_values=pixels[1:], **cached(family.model, cache)
        ).logits
    assert cache.layers[1].keys.shape[2] == ids.shape[1] - 22
    assert cache.get_seq_length() == ids.shape[1]
    with session.under(plan_of(graph, tokens=(TokenStage(1, 10, 32),), heads={2: (1,)})):
        assert close(logits[:, -1], family.model(**inputs).logits[:, -1])


@torch.no_grad()
def test_static_cache(llava):
    family, graph = llava
    inputs = family.inputs(2, before=(2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    session = session_on(family.model, graph)
    with session.under([planned(graph), plan_of(graph, layers_off=(1,))]):
        dynamic = family.model.generate(**inputs, **options)
        static = family.model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)
    with (
        session.under(planned(graph, tokens=STAGES)),
        pytest.raises(InputError, match="a static cache is as long as the whole prompt"),
    ):
        family.model.generate(**inputs, **options, cache_implementation="static")


@torch.no_grad()
def test_joined_caches_go_on_at_the_positions_of_each(llava):
    family, graph = llava
    plan = [
        plan_of(graph, tokens=(TokenStage(1, 6, 16, "pyramiddrop:k=1,ratio=0.4"),)),
        plan_of(graph, tokens=(TokenStage(2, 9, 16, "uniform:keep=9,k=2"),)),
    ]
    session, answers, expected = session_on(family.model, graph), [], []
    words = torch.tensor([[7], [9]])
    for row, one in enumerate(plan):
        inputs = family.inputs(1, row, after=(3 + row,))
        length = inputs["input_ids"].shape[1]
        with session.under(one):
            cache = family.model(**inputs, use_cache=True).past_key_values
            behind = {"input_ids": words[row][None], "position_ids": torch.tensor([[length]])}
            copied = cached(family.model, copy.deepcopy(cache))
            expected.append(family.model(**behind, **copied).logits)
        answers.append(CachedAnswer(cache, 0, length))
    with session.under(plan):
        joined = join(answers, session.program)
        logits = family.model(
            input_ids=words,
            position_ids=torch.tensor([[answer.length] for answer in answers]),
            attention_mask=torch.tensor(
                [[0] + [1] * answers[1].length, [1] * (1 + answers[1].length)]
            ),
            **cached(family.model, joined),
        ).logits
    for row in range(2):
        assert close(logits[row], expected[row][0])


def _flash_like(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Takes what flash attention takes: a 2-D mask, and position ids whose gaps part sequences."""
    position_ids = kwargs.get("position_ids")
    if position_ids is not None and len(position_ids) == 1:
        assert (position_ids.diff() == 1).all()
    queries, keys = query.shape[2], key.shape[2]
    visible = torch.ones(queries, keys).tril(keys - queries).bool()
    if attention_mask is not None:
        assert attention_mask.shape == (len(query), keys)
        visible = visible & attention_mask.bool()[:, None, None, :]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).nan_to_num(), None


def test_flash_attention_gets_its_own_kind_of_masks(llava):
    family, graph = llava
    inputs = family.inputs(2, before=(3, 6), padding_side="left")
    config = family.model.config.text_config
    ALL_ATTENTION_FUNCTIONS.register("flash_like", _flash_like)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_like", flash_attention_mask)
    runs = {}
    for implementation in ("sdpa", "flash_like"):
        config._attn_implementation = implementation
        try:
            with obeying(family.model, graph, planned(graph, tokens=STAGES)):
                alone = {name: value[1:] for name, value in inputs.items()}
                runs[implementation] = [
                    family.model.generate(**some, max_new_tokens=5, do_sample=False)
                    for some in (inputs, alone)
                ]
        finally:
            config._attn_implementation = "sdpa"
    for flash, sdpa in zip(runs["flash_like"], runs["sdpa"], strict=True):
        assert torch.equal(flash, sdpa)


@torch.no_grad()
def test_prompts_in_chunks(llava, lowered_family):
    options = {"max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": 9}
    for family, graph in (llava, lowered_family("gemma3")):
        inputs = family.inputs(2, before=(3, 6))
        session, plan = session_on(family.model, graph), planned(graph, heads={})
        # By masks, in chunks too: a chunk's end is seen where an image's tokens look ahead.
        with MaskedExecutor(family.model, graph).using(Gates.of([plan], graph)):
            expected = family.model.generate(**inputs, **options)
        with session.under(plan):
            assert torch.equal(family.model.generate(**inputs, **options), expected)
        with session.under(planned(graph, tokens=STAGES)), refused("cuts an image in two"):
            family.model.generate(**inputs, **options)


def test_quantised_weights_are_refused_where_they_would_be_narrowed(llava):
    family, graph = llava
    inputs = family.inputs()
    linear = family.model.model.language_model.layers[1].mlp.up_proj
    weight = linear.weight
    linear.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    try:
        session = session_on(family.model, graph)
        session.obey(plan_of(graph, heads={1: (0,)}, layers_off=(2,)))
        with refused("no plain matrix"):
            session.obey(plan_of(graph, mlp={1: (0,)}))
        session.close()
    finally:
        linear.weight = weight
    with obeying(family.model, graph, plan_of(graph, mlp={1: (0,)})):
        assert family.model(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_labels_and_hidden_states_keep_their_stock_shapes(llava):
    family, graph = llava
    inputs = family.inputs(2)
    with obeying(family.model, graph, planned(graph, tokens=STAGES)):
        out = family.model(**inputs, labels=inputs["input_ids"], output_hidden_states=True)
    assert out.loss.isfinite()
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    assert len(out.hidden_states) == graph.layers + 1
    assert torch.equal(out.hidden_states[0], out.hidden_states[1])


def refused(match):
    return pytest.raises(InputError, match=match)


@torch.no_grad()
def test_bad_input_is_refused_in_one_sentence_and_the_model_stays_good(llava):
    family, graph = llava
    session = session_on(family.model, graph)
    inputs = family.inputs()
    stock = family.model(**inputs).logits
    before = snapshot(family.model)
    plan, tokens = planned(graph), planned(graph, tokens=STAGES)
    with session.under(tokens), refused("input_ids rather than inputs_embeds"):
        family.model(inputs_embeds=torch.randn(1, 5, 64))
    for bad in (float("nan"), float("inf")):
        with session.under(plan), refused("not all finite"):
            family.model(**inputs | {"pixel_values": inputs["pixel_values"] * bad})
    wrong = plan_of(graph)
    object.__setattr__(wrong, "fingerprint", "0123")
    with refused("not for .llava."):
        session.obey(wrong)
    with session.under([plan, tokens]), refused("2 plans for a batch of 1"):
        family.model(**inputs)
    for broken, match in (
        ({"layers_off": (4,)}, "numbers below 4"),
        ({"heads": {0: (2,)}}, "numbers below 2"),
        ({"heads": {0: (1, 0)}}, "ascending"),
        ({"mlp": {9: (0,)}}, "mlp.9"),
        ({"tokens": (TokenStage(1, 17, 16),)}, "keeps 17 image tokens"),
        ({"tokens": (TokenStage(0, 8, 16, "fastv"),)}, "layer from 1"),
        ({"layers_off": (0, 1), "tokens": (TokenStage(2, 8, 16, "fastv"),)}, "leaves none on"),
        ({"tokens": (TokenStage(2, 8, 16, "best"),)}, "no token selector 'best'"),
    ):
        with refused(match):
            session.obey(plan_of(graph, **broken))
    assert session.program is None
    assert same_state(before, snapshot(family.model))
    assert torch.equal(family.model(**inputs).logits, stock)


@torch.no_grad()
def test_a_plan_is_fixed_for_the_life_of_a_cache(llava):
    family, graph = llava
    session = session_on(family.model, graph)
    inputs, more = family.inputs(), torch.tensor([[7]])
    one, other = planned(graph), plan_of(graph, mlp={2: (1,)})
    with session.under(one):
        cache = family.model(**inputs, use_cache=True).past_key_values
        expected = family.model(input_ids=more, **cached(family.model, copy.deepcopy(cache))).logits
    with session.under(other), refused("filled under another plan"):
        family.model(input_ids=more, **cached(family.model, cache))
    with session.under(dense_plan(graph)), refused("a plan that is not active"):
        family.model(input_ids=more, **cached(family.model, cache))
    with refused("a plan that is not active"):
        family.model(input_ids=more, **cached(family.model, cache))
    with session.under(one):
        assert close(family.model(input_ids=more, **cached(family.model, cache)).logits, expected)
    cache = family.model(**inputs, use_cache=True).past_key_values
    with session.under(one), refused("filled by the base model"):
        family.model(input_ids=more, **cached(family.model, cache))


def test_gradients_reach_gates(llava):
    family, graph = llava
    inputs = family.inputs(2)
    shape = {"layers": (2,), "heads": (2, 2), "mlp": (2, 8), "tokens": inputs["input_ids"].shape}
    gates = {name: {1: torch.rand(size).round().requires_grad_()} for name, size in shape.items()}
    with MaskedExecutor(family.model, graph).using(Gates(**gates)):
        family.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, gate in gates.items():
        assert gate[1].grad.isfinite().all(), name
        assert gate[1].grad.abs().sum() > 0, name


# -- texts, videos, attention weights, batching --------------------------------------------------


@pytest.mark.parametrize("selector", ["fastv", "uniform", "visionzip:dominant=4,contextual=2"])
@torch.no_grad()
def test_a_prompt_of_text_under_a_plan_that_drops_image_tokens(llava, selector):
    family, graph = llava
    text = family.inputs(2, images=0, before=(3, 9))
    stages = (TokenStage(0 if ":" in selector else 2, 6, 16, selector),)
    session = session_on(family.model, graph)
    runs = []
    for tokens in (stages, ()):
        with session.under(planned(graph, heads={}, tokens=tokens)):
            runs.append(family.model.generate(**text, max_new_tokens=5, do_sample=False))
            assert session.implementation.kept_image_tokens == {}
    assert torch.equal(*runs)


@torch.no_grad()
def test_tokens_of_a_video_are_dropped_as_those_of_images(lowered_family):
    family, graph = lowered_family("qwen2_5_vl")
    ids = torch.tensor([[1, 5, IMAGE_START, *[VIDEO] * 16, IMAGE_END, 8, 9, 10]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(64, 96, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
    }
    session = session_on(family.model, graph)
    with session.under(plan_of(graph, tokens=(TokenStage(2, 6, 16, "fastv"),))):
        cache = family.model(**inputs, use_cache=True)
        cache = next(value for value in cache.values() if hasattr(value, "layers"))
        assert session.implementation.kept_image_tokens == {2: [6]}
    assert [layer.keys.shape[2] for layer in cache.layers] == [23, 23, 13, 13]


@torch.no_grad()
def test_attention_weights_have_one_entry_a_layer(llava):
    family, graph = llava
    inputs = family.inputs(2)
    prompt = inputs["input_ids"].shape[1]
    family.model.set_attn_implementation("eager")
    session = session_on(family.model, graph)
    try:
        for tokens, left in (((), prompt), ((TokenStage(3, 4, 16),), prompt - 12)):
            with session.under(planned(graph, tokens=tokens)):
                weights = family.model(**inputs, output_attentions=True).attentions
                step = family.model.generate(
                    **inputs, max_new_tokens=2, do_sample=False, output_attentions=True,
                    return_dict_in_generate=True,
                ).attentions[1]  # fmt: skip
            # Two heads a group; layer 0 is off, layer 2 has no head left, layer 1 one group.
            shapes = [(2, heads, prompt, prompt) for heads in (0, 2, 0)] + [(2, 4, left, left)]
            assert [tuple(entry.shape) for entry in weights] == shapes
            keys = [prompt + 1] * 3 + [left + 1]
            assert [tuple(entry.shape[2:]) for entry in step] == [(1, length) for length in keys]
        both = [planned(graph), plan_of(graph, heads={3: (0,)})]
        with session.under(both), refused("one sample at a time"):
            family.model(**inputs, output_attentions=True)
    finally:
        family.model.set_attn_implementation("sdpa")


def test_continuous_batching_is_refused(qwen3):
    family, graph = qwen3
    session = session_on(family.model, graph)
    with session.under(planned(graph)), refused("continuous batching"):
        family.model.generate_batch([[5, 6, 7]])
    with session.under(dense_plan(graph)):
        assert family.model.init_continuous_batching() is not None
    session.close()
    assert "init_continuous_batching" not in vars(family.model)
