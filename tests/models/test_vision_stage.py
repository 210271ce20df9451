"""Vision selectors on stock models, against the same selection put together by hand."""

import pytest
import torch
from families import IMAGE, cached
from plans import plan_of
from restored import same_state, snapshot

from planner.ir.errors import InputError
from planner.ir.vision_tower import ranking_attention
from planner.models.running.skipping import obeying, session_on
from planner.models.tokens.selectors import TowerAttention, VisionInputs, select_features
from planner.models.tokens.vision_stage import places
from planner.plan import TokenStage
from planner.planning.compiler import plan_graph
from planner.planning.request import Request
from planner.planning.selectors import parse

SELECTORS = [
    "prumerge",
    "prumerge+",
    "prumerge+:ratio=0.25",
    "prumerge:max=0.2",
    "prumerge+:max=0.4",
    "visionzip:dominant=4,contextual=2",
    "hired:ratio=0.3",
    "hired:ratio=0.3,positions=original",
    "prumerge+:ratio=0.25,positions=original",
    "vispruner:keep=5",
    "downsample:side=2",
]


def close(actual, expected, relative=1e-5):
    return (actual - expected).norm() <= relative * expected.norm()


def from_tower(model, pixels, text):
    """Features of patches for the projector, and the attention that a selector ranks them by."""
    tower, attention = model.model.vision_tower, {}
    states = tower(pixels, output_hidden_states=True).hidden_states
    for index in parse(text).tower_layers:
        layer = tower.encoder.layers[index]
        normed = layer.layer_norm1(states[:-1][index])
        query, key = layer.self_attn.q_proj(normed)[:, 0], layer.self_attn.k_proj(normed)
        attention[index] = TowerAttention(query, key, layer.self_attn.num_heads)
    return states[model.config.vision_feature_layer], attention


def by_hand(model, inputs, text):
    """Logits of the last token of one sample, from a shorter prompt built outside the model."""
    selector = parse(text)
    features, attention = from_tower(model, inputs["pixel_values"], text)
    selection = select_features(selector, VisionInputs(features[:, 1:], features[:, 0], attention))
    words = model.get_input_embeddings()(inputs["input_ids"])[0]
    image = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    chosen, new = [], words.clone()
    for run, (part, indices) in enumerate(zip(selection.features, selection.indices, strict=True)):
        slots = image[run * 16 : (run + 1) * 16][places(indices, 16)]
        if selector.renumbers:
            slots = slots.sort().values
        new[slots] = model.model.multi_modal_projector(part)
        chosen += slots.tolist()
    left = sorted({*range(len(words))} - {*image.tolist()} | {*chosen})
    out = model.model.language_model(
        inputs_embeds=new[left][None],
        position_ids=torch.tensor([[*range(len(left))] if selector.renumbers else left]),
    )
    return model.lm_head(out.last_hidden_state)[0, -1]


@pytest.mark.parametrize("text", SELECTORS)
@torch.no_grad()
def test_a_vision_selector_equals_a_prompt_built_by_hand(llava, text):
    family, graph = llava
    inputs = family.inputs(2, before=(3, 6), images=2)
    session = session_on(family.model, graph)
    stock = family.model(**inputs).logits
    with session.under(plan_of(graph, tokens=(TokenStage(0, 8, 16, text),))):
        logits = family.model(**inputs).logits[:, -1]
        run = family.model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
    assert torch.equal(family.model(**inputs).logits, stock)
    assert run.past_key_values.layers[0].keys.shape[2] < inputs["input_ids"].shape[1]
    for row in range(2):
        where = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row, where][None],
            "pixel_values": inputs["pixel_values"][2 * row : 2 * row + 2],
        }
        expected = by_hand(family.model, alone, text)
        assert close(logits[row], expected)
        assert run.sequences[row, -3] == expected.argmax()


@pytest.mark.parametrize("text", SELECTORS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_equals_one_by_one_and_dropped_tokens_are_never_cached(llava, text, side):
    family, graph = llava
    inputs = family.inputs(3, before=(3, 6, 1), after=(5, 2), images=2, padding_side=side)
    with obeying(
        family.model, graph, plan_of(graph, tokens=(TokenStage(0, 8, 32, text),), heads={1: (0,)})
    ):
        together = family.model(**inputs, use_cache=True)
        keys = together.past_key_values.layers[0].parts[0].keys
        for row in range(3):
            where = inputs["attention_mask"][row].bool()
            alone = {
                "input_ids": inputs["input_ids"][row, where][None],
                "pixel_values": inputs["pixel_values"][2 * row : 2 * row + 2],
            }
            output = family.model(**alone, use_cache=True)
            assert close(together.logits[row, where.nonzero()[-1]], output.logits[:, -1])
            places = keys.positions[row]
            real = places[places >= 0]
            cached = output.past_key_values.layers[0].keys.shape[2]
            image = int((inputs["input_ids"][row, real] == IMAGE).sum())
            assert int(where[real].sum()) == cached < int(where.sum())
            assert image == cached - int((alone["input_ids"] != IMAGE).sum())


@pytest.mark.parametrize("text", SELECTORS)
def test_a_second_question_behind_a_vision_selector(llava, text):
    family, graph = llava
    inputs = family.inputs(2, before=(3, 6))
    question = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    with obeying(
        family.model, graph, plan_of(graph, tokens=(TokenStage(0, 8, 16, text),), layers_off=(1,))
    ):
        first = family.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 11, dtype=torch.long)], 1)
        asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        second = family.model.generate(**asked, **cached(family.model, first.past_key_values))
        again = family.model.generate(**asked, pixel_values=inputs["pixel_values"])
    assert torch.equal(second, again)


def test_tiles_share_what_a_picture_may_spend(lowered_family, monkeypatch):
    """Two pictures in five and four runs of four patches; two and two lines with an end each."""
    family, graph = lowered_family("llava_next")
    model, text = family.model, "hired:ratio=0.5,alpha=0.5"
    monkeypatch.setattr(model.config, "image_grid_pinpoints", [[64, 64], [32, 96]])
    pixels = torch.randn(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[5, *[IMAGE] * 24, 6, *[IMAGE] * 18, 7]])
    inputs = {"input_ids": ids, "pixel_values": pixels}
    given = []
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda _, args, output: given.append(args[0])
    )
    plan = plan_of(graph, tokens=(TokenStage(0, 20, 42, text),))
    with torch.no_grad(), obeying(model, graph, plan):
        model(**inputs, image_sizes=torch.tensor([[64, 64], [32, 96]]))
        runs = torch.cat([pixels[0], pixels[1, :4]])
        with pytest.raises(InputError, match="call the whole model with image_sizes"):
            model.get_image_features(pixels, torch.tensor([[64, 64], [32, 96]]))
    hook.remove()
    with torch.no_grad():
        features, attention = from_tower(model, runs, text)
    shared, alone = (
        select_features(parse(text), VisionInputs(features[:, 1:], None, attention, tiles=tiles))
        for tiles in (((2, 2), (1, 3)), None)
    )
    assert [len(part) for part in shared.features] != [len(part) for part in alone.features]
    assert torch.equal(given[0], torch.cat(shared.features)[None])


@torch.no_grad()
def test_a_vision_selector_and_a_decoder_selector_in_turn(llava):
    family, graph = llava
    inputs = family.inputs(2)
    stages = (TokenStage(0, 6, 16, "visionzip:dominant=4,contextual=2"), TokenStage(2, 2, 16))
    with obeying(family.model, graph, plan_of(graph, tokens=stages, heads={3: (0,)})):
        cache = family.model(**inputs, use_cache=True).past_key_values
    text = inputs["input_ids"].shape[1] - 16
    assert [layer.keys.shape[2] - text for layer in cache.layers] == [6, 6, 2, 2]


def test_places_keep_patches_where_they_were():
    def at(*indices):
        return places(torch.tensor(indices), 8).tolist()

    assert at(5, 2, 7) == [5, 2, 7]
    assert at(5, 2, -1) == [5, 2, 7]
    assert at(7, 6, -1, -1) == [7, 6, 4, 5]
    assert at(-1, 0, 3, -1) == [1, 0, 3, 7]
    assert at(-1, -1) == [6, 7]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("phi", "prumerge:max=0.5", "CLS token"),
        ("mistral3", "visionzip:dominant=2,contextual=1", "does not compute separately"),
        ("llava", "trim", "text tower of CLIP"),
        # Neither looks at the tower, so it is the projector that cannot work on some patches.
        ("gemma3", "visionzip:dominant=2,contextual=1", "merges neighbouring"),
        ("mistral3", "downsample:side=2", "merges neighbouring"),
    ],
)
@torch.no_grad()
def test_models_that_a_selector_cannot_work_with(lowered_family, name, text, match):
    family, graph = lowered_family(name)
    inputs = family.inputs()
    stock = family.model(**inputs).logits
    before = snapshot(family.model)
    session = session_on(family.model, graph)
    plan = plan_of(graph, tokens=(TokenStage(0, 8, 16, text),))
    with pytest.raises(InputError, match=match), session.under(plan):
        family.model(**inputs)
    assert torch.equal(family.model(**inputs).logits, stock)
    late = plan_of(graph, tokens=(TokenStage(1, 8, 16, "prumerge"),))
    with pytest.raises(InputError, match="works before layer 0"):
        session.obey(late)
    with pytest.raises(InputError, match="all plans of a batch"):
        session.obey([plan_of(graph), plan_of(graph, tokens=(TokenStage(0, 8, 16, "prumerge"),))])
    session.close()
    assert same_state(before, snapshot(family.model))
    # `planner compile` says so, too, but for what a plan does not know: the folder of a tower.
    if text != "trim":
        with pytest.raises(InputError, match=match):
            plan_graph(graph, Request(name, 0.9, tokens=text, utilities="prior"))


def test_a_tower_with_fewer_layers_than_a_selector_ranks_by(lowered_family):
    _, graph = lowered_family("llava")
    shallow = [o for o in graph if o.part != "vision" or o.kind != "attention" or not o.layer]
    graph = graph.replacing(shallow, graph.sites)
    with pytest.raises(InputError, match="layer -2 of the vision tower, and this one attends in 1"):
        ranking_attention(graph, -2, "fastervlm")


@pytest.mark.parametrize("name", ["smolvlm", "internvl"])
def test_patches_that_are_shuffled_together_cannot_be_ranked(lowered_family, name):
    _, graph = lowered_family(name)
    with pytest.raises(InputError, match="merges neighbouring"):
        plan_graph(graph, Request(name, 0.9, tokens="fastervlm:keep=4", utilities="prior"))
