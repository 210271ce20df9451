"""Selectors that compare images with the question, on stock models beside a CLIP model."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from small_clip import LENGTH, WORDS, write_clip
from transformers import CLIPModel

import planner
from planner.ir.errors import InputError
from planner.models.running.skipping import session_on
from planner.models.tokens.text_tower import TextTower, question
from planner.plan import TokenStage
from planner.planning.selectors import parse
from planner.planning.selectors.selector import Sizes
from tests.plans import plan_of


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP model as wide as the vision tower of the small LLaVA, in a folder."""
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_one_question_is_embedded_as_clip_does_it(clip):
    model, tower = CLIPModel.from_pretrained(clip).eval(), TextTower(clip)
    ids = torch.tensor([[0, 2, 3, 4, 1]])
    expected = model.get_text_features(input_ids=ids).pooler_output[0]
    with question("what is red"):
        torch.testing.assert_close(tower.read(1, whole=False)[0], expected)
        unit = expected / expected.norm()
        torch.testing.assert_close(tower.read(3, whole=True), unit.expand(3, -1))


def test_a_long_question_is_cut_or_read_in_chunks(clip):
    model, tower = CLIPModel.from_pretrained(clip).eval(), TextTower(clip)
    words = ["what", "is", "the", "red", "circle", "left", "of", "the", "blue", "circle"]
    ids = [0, *(WORDS.index(word) for word in words), 1]
    cut = model.get_text_features(input_ids=torch.tensor([[*ids[: LENGTH - 1], 1]])).pooler_output
    padded = torch.tensor(ids + [0] * (2 * LENGTH - len(ids))).view(2, LENGTH)
    mask = torch.tensor([1] * len(ids) + [0] * (2 * LENGTH - len(ids))).view(2, LENGTH)
    chunks = model.get_text_features(input_ids=padded, attention_mask=mask).pooler_output
    with question([" ".join(words)]):
        torch.testing.assert_close(tower.read(1, whole=False), cut)
        mean = (chunks / chunks.norm(dim=-1, keepdim=True)).mean(0)
        torch.testing.assert_close(tower.read(1, whole=True)[0], mean)


@pytest.mark.parametrize("text", ["trim:ratio=0.25", "cdpruner:keep=5"])
@torch.no_grad()
def test_the_question_decides_what_stays(lowered_family, clip, text):
    family, graph = lowered_family("llava")
    model, inputs = family.model, family.inputs()
    keep = 5
    plan = plan_of(graph, tokens=(TokenStage(0, keep, 16, f"{text},clip={clip}"),))
    rows = int(inputs["input_ids"].shape[0])
    images = int(inputs["pixel_values"].shape[0])

    def logits(*asked):
        with planner.question(asked if len(asked) > 1 else asked[0]):
            return model(**inputs).logits

    session = session_on(model, graph)
    with session.under(plan):
        red, blue = logits("what is red"), logits("blue circle left of the circle")
        assert session.implementation.kept_image_tokens == {0: [keep] * rows}
        assert not torch.equal(red, blue)
        of_row = (inputs["input_ids"] == model.config.image_token_id).sum(1) // 16
        first = ["what is red"] * int(of_row[0])
        mixed = logits(*first, *["blue circle left of the circle"] * (images - len(first)))
        torch.testing.assert_close(mixed[0], red[0])
        torch.testing.assert_close(mixed[1:], blue[1:])
        with pytest.raises(InputError, match=r"within planner\.question"):
            model(**inputs)
        with pytest.raises(InputError, match=f"{images + 1} questions, and the images are encode"):
            logits(*["red"] * (images + 1))


def test_what_cannot_be_is_one_sentence(tmp_path, clip, lowered_family):
    with pytest.raises(InputError, match="holds no CLIP model with a tokenizer"):
        TextTower(tmp_path)
    with pytest.raises(InputError, match=r"no CLIP model: no config\.json"):
        parse(f"trim:ratio=0.5,clip={tmp_path}").products(0, Sizes(16, 5, tower=32))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="no config of a CLIP model"):
        parse(f"cdpruner:keep=2,clip={tmp_path}").products(0, Sizes(16, 5, tower=32))
    tower = TextTower(clip)
    with pytest.raises(InputError, match=r"a width of 30, and that of the CLIP model .* 32: it is"):
        tower.patches(torch.zeros(1, 4, 30))


def test_the_text_tower_is_priced(clip):
    """FLOPs of its products as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    tower = TextTower(clip)
    tower.text_model.config._attn_implementation = "eager"
    asked = "what is the red circle left of the blue circle"
    with FlopCounterMode(display=False) as counter, question(asked):
        embedded = tower.read(1, whole=True)
        tower.patches(torch.zeros(1, 16, 32))
    scores = 2 * 16 * 12 * 2
    selector = parse(f"cdpruner:keep=0,clip={clip}")
    products = selector.products(0, Sizes(16, 12, hidden=7, tower=32))
    priced = sum(2 * rows * columns * inner for rows, columns, inner in products)
    assert embedded.shape == (1, 12)
    assert priced == counter.get_total_flops() + scores + 2 * 16 * 16 * 7
    weights = sum(np.prod(p.shape) for n, p in tower.named_parameters() if _is_matrix(n, p))
    assert selector.parameters(7) == weights


def _is_matrix(name, parameter):
    return parameter.ndim == 2 and "embedding" not in name


@pytest.fixture
def guided(lowered_family, clip):
    """A copy of the small LLaVA, planned to keep what a question is about, and its inputs."""
    family, graph = lowered_family("llava")
    model = copy.deepcopy(family.model)
    stage = TokenStage(0, 5, 16, f"cdpruner:keep=5,clip={clip}")
    planner.compile(model, plan=plan_of(graph, tokens=(stage,)))
    yield model, family.inputs()
    planner.restore(model)


QUESTIONS = ["what is red", "blue circle left of the circle", "what", "the blue circle"]


@torch.no_grad()
def asked(model, inputs, text):
    with planner.question(text):
        return model(**inputs).logits


@torch.no_grad()
def test_threads_ask_each_their_own_question(guided):
    model, inputs = guided
    alone = [asked(model, inputs, text) for text in QUESTIONS]
    assert not torch.equal(alone[0], alone[1])

    def often(n):
        return all(torch.equal(asked(model, inputs, QUESTIONS[n]), alone[n]) for _ in range(4))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(often, range(4)))
        # A question holds where it was said: another thread was told none.
        with planner.question("what is red"), pytest.raises(InputError, match="says what is asked"):
            pool.submit(model, **inputs).result()


@torch.no_grad()
def test_a_copy_asks_by_itself(guided):
    model, inputs = guided
    expected, made = asked(model, inputs, "what is red"), copy.deepcopy(model)
    torch.testing.assert_close(asked(made, inputs, "what is red"), expected)
    planner.restore(made)
    torch.testing.assert_close(asked(model, inputs, "what is red"), expected)


@torch.no_grad()
def test_saving_leaves_the_clip_model_out_and_a_plan_finds_it_again(guided, tmp_path):
    model, inputs = guided
    expected, plan = asked(model, inputs, "what is red"), planner.plan_of(model)
    model.save_pretrained(tmp_path / "model")
    planner.save_plan(plan, tmp_path / "plan.yaml")
    again, found = type(model).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not found["unexpected_keys"]
    planner.compile(again.eval(), plan=planner.load_plan(tmp_path / "plan.yaml"))
    torch.testing.assert_close(asked(again, inputs, "what is red"), expected)
