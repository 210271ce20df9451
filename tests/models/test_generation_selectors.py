"""Token stages of whole models beside the same by hand: scores, positions, dropped tokens."""

import pytest
import torch
from families import IMAGE
from plans import plan_of
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from planner.models.running.skipping import obeying, session_on
from planner.models.tokens.selectors import DecoderInputs, select_tokens
from planner.plan import TokenStage
from planner.planning.selectors import DART


def close(actual, expected, relative=1e-5):
    return (actual - expected).norm() <= relative * expected.norm()


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


def pyramid_by_hand(model, inputs, stages, answer=(), asking=()):
    """Logits from the prompt's last token on, of one sample that drops tokens layer by layer.

    What it asks is the prompt's last token, or on average those at some places.
    """
    decoder = model.model.language_model
    image = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    states = model.get_input_embeddings()(inputs["input_ids"])
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    features = tower.hidden_states[model.config.vision_feature_layer][:, 1:]
    states[0, image] = model.model.multi_modal_projector(features).flatten(0, 1)
    words = torch.tensor([answer], dtype=torch.long)
    ends = torch.tensor(asking or [states.shape[1] - 1])
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
            seen = torch.arange(prompt) <= ends[:, None]
            scores = (query[:, :, ends] @ key.mT / 4).masked_fill(~seen, -torch.inf)
            row = scores.softmax(-1).mean((1, 2))[0]
            best = image[row[image].argsort(descending=True)[: stages[index]]].sort().values
            kept = torch.ones(states.shape[1], dtype=torch.bool)
            kept[image] = False
            kept[best] = True
            states, image, ends, prompt = (
                states[:, kept],
                (kept.cumsum(0) - 1)[best],
                (kept.cumsum(0) - 1)[ends],
                int(kept[:prompt].sum()),
            )
            ids = torch.arange(states.shape[1])[None]
            turned = decoder.rotary_emb(states, ids)
        states = layer(states, position_embeddings=turned, position_ids=ids)
    return model.lm_head(decoder.norm(states))[0, 0 if asking else prompt - 1 :]


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
def test_every_question_chooses_for_pyramiddrop_while_answers_are_learned(llava):
    """In a batch with turns of different numbers and lengths, and with an end behind an answer."""
    family, graph = llava
    text = "pyramiddrop:k=1/3,ratio=0.5/0.2"
    stages = (TokenStage(1, 8, 16, text), TokenStage(3, 3, 16, text))
    inputs = family.inputs(2, before=(3, 3), after=(17, 17))
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    # Behind an image from 3 to 18: (question, answer) of so many tokens, and what no answer is.
    for row, answers in enumerate((((22, 25), (30, 34)), ((21, 22), (25, 29), (31, 36)))):
        for begin, end in answers:
            labels[row, begin:end] = ids[row, begin:end]
    with obeying(family.model, graph, plan_of(graph, tokens=stages)):
        logits = family.model(**inputs, labels=labels).logits
    for row, asking in enumerate(([21, 29], [20, 24, 30])):
        alone = {
            "input_ids": ids[row : row + 1],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        expected = pyramid_by_hand(family.model, alone, {1: 8, 3: 3}, asking=asking)
        last = pyramid_by_hand(family.model, alone, {1: 8, 3: 3}, asking=asking[-1:])
        assert close(logits[row, -17:], expected[-17:])
        assert not close(logits[row, -17:], last[-17:])


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
