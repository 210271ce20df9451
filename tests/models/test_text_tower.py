"""Selectors that compare images with the question, on stock models beside a CLIP model."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, set_seed

import planner
from planner.ir.errors import InputError
from planner.models.running.skipping import session_on
from planner.models.tokens.text_tower import TextTower, question
from planner.plan import TokenStage
from planner.planning.selectors import parse
from planner.planning.selectors.selector import Sizes
from tests.plans import plan_of

WORDS = ["<s>", "</s>", "what", "is", "red", "blue", "left", "of", "the", "circle"]
LENGTH = 8


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP model as wide as the vision tower of the small LLaVA, in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    set_seed(0)
    side = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    text = {
        "vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "num_attention_heads": 2,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **side,
    }  # fmt: skip
    vision = {**side, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="the"
    ).save_pretrained(folder)
    return folder


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
