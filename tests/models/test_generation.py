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
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from planner.ir.errors import InputError
from planner.models.running.joined_cache import CachedAnswer, join
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.skipping import obeying, session_on
from planner.models.tokens.selectors import DecoderInputs, select_tokens
from planner.plan import TokenStage
from planner.planning.selectors import DART


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


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("selector", ["fastv", "uniform", "sparsevlm", "random", "divprune"])
@torch.no_grad()
def test_attention_implementations_and_selectors(llava, implementation, selector):
    """In a padded batch of two plans every sample chooses the tokens that it chooses alone."""
    family, graph = llava
    plan = [
        plan_of(
            graph,
            heads={1: (0,)},
            layers_off=(0,),
            tokens=(TokenStage(2, 7, 16, selector), TokenStage(3, 3, 16, selector)),
        ),
        plan_of(graph, heads={2: (0,)}, tokens=(TokenStage(2, 7, 16, selector),)),
    ]
    inputs = family.inputs(2, before=(3, 6), after=(5, 3))
    session = session_on(family.model, graph)
    family.model.set_attn_implementation(implementation)
    try:
        with session.under(plan):
            logits = family.model(**inputs).logits[:, -1]
        for row in range(2):
            where = inputs["attention_mask"][row].bool()
            with session.under(plan[row]):
                alone = family.model(
                    input_ids=inputs["input_ids"][row, where][None],
                    pixel_values=inputs["pixel_values"][row : row + 1],
                )
            assert close(logits[row], alone.logits[0, -1])
    finally:
        family.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_dart_sees_the_keys_and_normed_states_of_the_stock_model(llava, side):
    family, graph = llava
    inputs = family.inputs(3, before=(3, 6, 1), after=(5, 2), padding_side=side)
    stock = family.model(**inputs, output_hidden_states=True, use_cache=True)
    seen = DecoderInputs(
        image=inputs["input_ids"] == IMAGE,
        valid=inputs["attention_mask"].bool(),
        key=stock.past_key_values.layers[1].keys,
        normed_states=family.model.model.language_model.norm(stock.hidden_states[2]),
    )
    keep = select_tokens(DART(keep=8), seen, 2).keep & seen.valid
    plan = plan_of(graph, tokens=(TokenStage(2, 12, 16, "dart:keep=8"),))
    with obeying(family.model, graph, plan):
        cache = family.model(**inputs, use_cache=True).past_key_values
    for row, places in enumerate(cache.layers[2].parts[0].keys.positions):
        assert places[places >= 0].tolist() == keep[row].nonzero().flatten().tolist()
        assert int((keep & seen.image)[row].sum()) == 12


def pyramid_by_hand(model, inputs, stages, answer=()):
    """Logits from the prompt's last token on, of one sample that drops tokens layer by layer."""
    decoder = model.model.language_model
    image = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    states = model.get_input_embeddings()(inputs["input_ids"])
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    features = tower.hidden_states[model.config.vision_feature_layer][:, 1:]
    states[0, image] = model.model.multi_modal_projector(features).flatten(0, 1)
    words = torch.tensor([answer], dtype=torch.long)
    prompt, states = states.shape[1], torch.cat([states, model.get_input_embeddings()(words)], 1)
    for index, layer in enumerate(decoder.layers):
        ids = torch.arange(states.shape[1])[None]
        turned = decoder.rotary_emb(states, ids)
        if index in stages:
            normed, block = layer.input_layernorm(states[:, :prompt]), layer.self_attn
            query, key = (
                p(normed).view(1, prompt, -1, 16).transpose(1, 2)
                for p in (block.q_proj, block.k_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, *(t[:, :prompt] for t in turned))
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            row = (query[:, :, -1:] @ key.mT / 4).softmax(-1).mean(1)[0, 0]
            best = image[row[image].argsort(descending=True)[: stages[index]]].sort().values
            kept = torch.ones(states.shape[1], dtype=torch.bool)
            kept[image] = False
            kept[best] = True
            states, image, prompt = (
                states[:, kept],
                (kept.cumsum(0) - 1)[best],
                int(kept[:prompt].sum()),
            )
            ids = torch.arange(states.shape[1])[None]
            turned = decoder.rotary_emb(states, ids)
        states = layer(states, position_embeddings=turned, position_ids=ids)
    return model.lm_head(decoder.norm(states))[0, prompt - 1 :]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_pyramiddrop_equals_the_layers_run_by_hand_in_decoding_too(llava, side):
    family, graph = llava
    inputs = family.inputs(3, before=(3, 6, 1), after=(5, 2), images=2, padding_side=side)
    text = "pyramiddrop:k=1/3,ratio=0.5/0.2"
    stages = (TokenStage(1, 16, 32, text), TokenStage(3, 6, 32, text))
    for row in range(3):
        where = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row, where][None],
            "pixel_values": inputs["pixel_values"][2 * row : 2 * row + 2],
        }
        with obeying(family.model, graph, plan_of(graph, tokens=stages)):
            logits = family.model(**inputs).logits[row, where.nonzero()[-1]]
            run = family.model.generate(
                **alone, max_new_tokens=4, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        answer = run.sequences[0, -4:].tolist()
        expected = pyramid_by_hand(family.model, alone, {1: 16, 3: 6}, answer[:3])
        assert close(logits[0], expected[0])
        assert close(torch.cat(run.logits), expected)


@torch.no_grad()
def test_pyramiddrop_in_a_batch_of_plans_where_the_next_layer_is_off(llava):
    family, graph = llava
    text = "pyramiddrop:k=1/2,ratio=0.5/0.2"
    stages = (TokenStage(1, 8, 16, text), TokenStage(2, 3, 16, text))
    plan = [
        plan_of(graph, heads={1: (0,)}, layers_off=(2,), tokens=stages),
        plan_of(graph, heads={2: (1,)}, layers_off=(1,), tokens=stages),
    ]
    inputs = family.inputs(2, before=(3, 6), after=(5, 3))
    session = session_on(family.model, graph)
    with session.under(plan):
        together = family.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        logits = family.model(**inputs).logits[:, -1]
    for row in range(2):
        where = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row, where][None],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        with session.under(plan[row]):
            assert close(logits[row], family.model(**alone).logits[0, -1])
            answer = family.model.generate(**alone, max_new_tokens=3, do_sample=False)
        assert together[row, -3:].tolist() == answer[0, -3:].tolist()


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


# -- assistants, texts, videos, attention weights, batching ----------------------------------------


def with_repetition(family):
    """A prompt whose end has been there before, so that a look-up drafts in the first pass."""
    inputs = family.inputs(before=(30,), after=(12,))
    inputs["input_ids"][0, -8:] = inputs["input_ids"][0, 2:10]
    return inputs


@pytest.mark.parametrize("selector", ["fastv", "sparsevlm", "uniform", "random"])
def test_an_assistant_changes_nothing(llava, selector):
    """Drafts stand behind the prompt when its image tokens are chosen, and have no say in that."""
    family, graph = llava
    inputs = with_repetition(family)
    stages = (TokenStage(2, 9, 16, selector), TokenStage(3, 4, 16, selector))
    assistant = copy.deepcopy(family.model)
    greedy = {"do_sample": False, "max_new_tokens": 12}
    with session_on(family.model, graph).under(planned(graph, tokens=stages)):
        expected = family.model.generate(**inputs, **greedy)
        for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
            assert torch.equal(family.model.generate(**inputs, **greedy, **more), expected)


@torch.no_grad()
def test_fastv_scores_by_the_end_of_the_prompt_and_not_by_drafts(llava):
    family, graph = llava
    inputs = family.inputs(after=(12,))
    session = session_on(family.model, graph)
    with session.under(plan_of(graph, tokens=(TokenStage(2, 5, 16, "fastv"),))):
        cache = DynamicCache()
        family.model(**inputs, **cached(family.model, cache))
        for drafts in (1, 4):
            longer = {
                name: torch.cat([inputs[name], torch.full((1, drafts), fill)], 1)
                for name, fill in (("input_ids", 77), ("attention_mask", 1))
            }
            other = DynamicCache()
            pixels = {"pixel_values": inputs["pixel_values"]}
            family.model(
                **longer, **pixels, **cached(family.model, other), logits_to_keep=1 + drafts
            )
            kept, known = (c.layers[2].parts[0].keys.positions for c in (other, cache))
            assert torch.equal(kept[:, :-drafts], known)


@pytest.mark.parametrize(
    "options", [{"assistant_early_exit": 1}, {"assistant_early_exit": 2}], ids=["one", "two"]
)
def test_the_first_layers_as_an_assistant(qwen3, options):
    family, graph = qwen3
    inputs = family.inputs(before=(9,))
    greedy = {"do_sample": False, "max_new_tokens": 8}
    for plan in (
        plan_of(graph, layers_off=(1,), heads={2: (1,)}),
        plan_of(graph, layers_off=(0,), mlp={1: (0, 3, 4)}),
    ):
        with session_on(family.model, graph).under(plan):
            expected = family.model.generate(**inputs, **greedy)
            assert torch.equal(family.model.generate(**inputs, **greedy, **options), expected)


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
