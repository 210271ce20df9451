"""The model folder in the repository: loads with stock classes, answers as its card says."""

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

import planner.training
from planner.models.running.kv_cache import answers_stored, kv_bytes
from planner.training.data import SceneQuestions
from planner.training.evaluate import evaluate, predict

MODELS = Path(planner.training.__file__).resolve().parent.parent / "models"
FOLDER = MODELS / "tiny_llava"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(FOLDER).eval()


@pytest.mark.parametrize(("name", "layers"), [("tiny_llava", 8), ("deep_llava", 16)])
def test_sizes(name, layers):
    model = LlavaForConditionalGeneration.from_pretrained(MODELS / name)
    text = model.config.text_config
    assert (text.num_hidden_layers, text.num_attention_heads) == (layers, 8)
    assert model.generation_config.use_cache
    assert (MODELS / name / "model.safetensors").stat().st_size < 20e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_processor_makes_llava_inputs(processor):
    assert isinstance(processor, LlavaProcessor)
    sample = SceneQuestions("test", 1)[0]
    content = [{"type": "image"}, {"type": "text", "text": "How many red circles are there?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert text == "USER: <image>\nHow many red circles are there? ASSISTANT:"
    inputs = processor(images=sample.image, text=text, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)
    assert ids.count(processor.image_token_id) == 49
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids.count(processor.tokenizer.unk_token_id) == 0
    assert (
        processor.tokenizer.decode(ids, skip_special_tokens=True)
        == "how many red circles are there?"
    )


@pytest.mark.parametrize("text", ["the word is cat.", "42", "zebra crossing 2026", "top left"])
def test_any_lower_case_text_survives_the_tokenizer(processor, text):
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_answers_do_not_depend_on_the_batch(model, processor):
    samples = [SceneQuestions("test", 6)[i] for i in range(6)]
    together = predict(model, processor, samples, batch_size=6)
    assert together == predict(model, processor, samples, batch_size=1)


def test_accuracy_is_what_the_card_says(model, processor):
    samples = [SceneQuestions("test", 120)[i] for i in range(120)]
    measured = evaluate(model, processor, samples, batch_size=120)
    assert measured["accuracy"] > 0.88
    # Relations between objects are its known weak spot: see the model card.
    spatial = measured["families"].pop("spatial")
    assert spatial > 0.4
    assert min(measured["families"].values()) > 0.85


def test_the_deeper_model_answers_as_its_card_says(processor):
    folder = MODELS / "deep_llava"
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    own = AutoProcessor.from_pretrained(folder)
    families = ["existence", "attribute", "count", "spatial", "text"]
    samples = [SceneQuestions("test", 100, families=families)[i] for i in range(100)]
    assert own.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert evaluate(model, own, samples, batch_size=100)["accuracy"] > 0.97


def test_an_answer_without_a_cache_has_none():
    assert (kv_bytes(None), answers_stored(None)) == (0, None)
