"""Packed branches are to the model what each question is alone."""

import pytest
import torch
from PIL import Image

from planner.training.data import Conversation, Packer, SceneConversations, Turn
from planner.training.data.packing import IGNORE
from planner.training.tiny_llava import TinyLlavaConfig, build_model, build_processor


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor):
    return build_model(TinyLlavaConfig(output_dir="unused", layers=3), processor).eval()


@pytest.fixture(scope="module")
def conversations():
    return [SceneConversations("train", 6)[i] for i in range(6)]


def prompts(processor, conversation, turns):
    """The same turns through the chat template and the stock processor."""
    messages = []
    for number, turn in enumerate(turns):
        image = [{"type": "image"}] if number == 0 else []
        messages += [
            {"role": "user", "content": [*image, {"type": "text", "text": turn.question}]},
            {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]},
        ]
    text = processor.apply_chat_template(messages)
    return processor(images=conversation.image, text=text, return_tensors="pt")


@torch.inference_mode()
def test_each_branch_gets_the_logits_of_its_single_turn_prompt(processor, model, conversations):
    batch = Packer(processor, max_text_tokens=110)(conversations)
    labels = batch.pop("labels")
    packed = model(**batch).logits
    for row, conversation in enumerate(conversations):
        trained = (labels[row] != IGNORE).nonzero().flatten()
        start = 0
        for turn in conversation.turns:
            single = prompts(processor, conversation, [turn])
            logits = model(**single).logits[0]
            answer = processor.tokenizer(turn.answer, add_special_tokens=False)["input_ids"]
            ids = [*answer, processor.tokenizer.eos_token_id]
            where = trained[start : start + len(ids)]
            if not len(where):
                continue  # no room was left for this turn
            assert labels[row, where].tolist() == ids
            assert torch.equal(single["input_ids"][0, -len(ids) :], torch.tensor(ids))
            expected = logits[-len(ids) - 1 : -1]
            torch.testing.assert_close(packed[row, where - 1], expected, atol=2e-5, rtol=1e-4)
            start += len(ids)
        assert start == len(trained)


def test_a_dialogue_is_the_chat_template(processor, conversations):
    for conversation in conversations:
        turns = conversation.turns[:2]
        short = Conversation(conversation.id, conversation.image, turns)
        batch = Packer(processor, max_text_tokens=200, dialogue_share=1.0)([short])
        stock = prompts(processor, short, turns)
        assert batch["input_ids"].tolist() == stock["input_ids"].tolist()
        assert batch["position_ids"][0].tolist() == list(range(stock["input_ids"].shape[1]))
        length = stock["input_ids"].shape[1]
        assert torch.equal(
            batch["attention_mask"][0, 0], torch.ones(length, length, dtype=torch.bool).tril()
        )
        torch.testing.assert_close(batch["pixel_values"], stock["pixel_values"])


def test_room_is_never_passed_and_padding_is_seen_by_nobody(processor, conversations):
    for room in (12, 40, 110):
        batch = Packer(processor, max_text_tokens=room)(conversations)
        image = batch["input_ids"] == processor.image_token_id
        padding = batch["input_ids"] == processor.tokenizer.pad_token_id
        assert (~image & ~padding).sum(dim=1).max() <= room
        seen = batch["attention_mask"][:, 0]
        for row in range(len(conversations)):
            assert not seen[row][~padding[row]][:, padding[row]].any()


def test_text_only_conversations_share_a_batch(processor, model):
    image = Image.new("RGB", (100, 40), (200, 30, 30))
    batch = Packer(processor, max_text_tokens=50)(
        [
            Conversation("a", None, (Turn("hello there?", "yes"),)),
            Conversation("b", image, (Turn("Is there a red circle?", "no"),)),
        ]
    )
    assert batch["pixel_values"].shape == (1, 3, 56, 56)
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [0, 49]
    assert torch.isfinite(model(**batch).loss)
