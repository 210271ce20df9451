"""Training sees the token ids that the model is asked with, and those of LLaVA-1.5's own code."""

import itertools

import pytest
import torch
from PIL import Image
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from planner.ir.errors import InputError
from planner.loading import prompt_inputs
from planner.models.conversion import as_llava_v1
from planner.training.data import Conversation, Packer, Turn
from planner.training.data.packing import IGNORE
from planner.training.tiny_llava import build_processor

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
CORPUS = [
    SYSTEM,
    "USER: ASSISTANT: What color is it? A red one.",
    "Where? On the left, I think so.",
]
TURNS = (
    Turn("What color is it?", "A red one."),
    Turn(" Where?\nTell me", "On the left; I think so.\n"),
    Turn("Why?", "zebra crossing 42"),
)
WIDTH, TOKENS = 28, 4
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]


def byte_level():
    """As GPT-2's and Llama 3's tokenizers."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    return made


def sentence_piece():
    """As Llama 2's: a space is a part of the word behind it, and every text begins with one."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    made = Tokenizer.from_str(learner.to_str())
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return made


@pytest.fixture(scope="module", params=[byte_level, sentence_piece], ids=lambda f: f.__name__)
def tokenizer(request):
    made = request.param()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


@pytest.fixture(scope="module")
def stock(tokenizer):
    """As LLaVA-1.5's on the hub: it cuts pictures, and its template ends no answer."""
    side = {"height": WIDTH, "width": WIDTH}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": WIDTH}, crop_size=side),
        tokenizer,
        patch_size=WIDTH // 2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
            "{% for part in message['content'] %}"
            "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}"
            "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        ),
    )


@pytest.fixture(scope="module")
def processor(stock):
    return as_llava_v1(stock)


def picture(width=40, height=20):
    return Image.effect_noise((width, height), 90).convert("RGB")


def authors_ids(tokenizer, turns, has_image):
    """Ids and labels as LLaVA's code makes them: whatever is around a picture is read apart."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    text, ends = SYSTEM, []
    for number, turn in enumerate(turns):
        tag = "<image>\n" if has_image and not number else ""
        text += f"USER: {tag}{turn.question} ASSISTANT:"
        begin = text
        text += f" {turn.answer}</s>"
        ends.append((begin, text))

    def of(text):
        image = tokenizer.convert_tokens_to_ids("<image>")
        before, *behind = text.split("<image>")
        return [tokenizer.bos_token_id, *ids(before), *(
            token for part in behind for token in [*[image] * TOKENS, *ids(part)]
        )]  # fmt: skip

    whole = of(text)
    labels = [IGNORE] * len(whole)
    for begin, end in ends:
        start, stop = len(of(begin)), len(of(end))
        labels[start:stop] = whole[start:stop]
    return whole, labels


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("has_image", [True, False])
def test_dialogues_have_the_authors_ids_and_labels(tokenizer, processor, count, has_image):
    turns = TURNS[:count]
    conversation = Conversation("a", picture() if has_image else None, turns)
    batch = Packer(processor, 500, dialogue_share=1.0)([conversation])
    whole, labels = authors_ids(tokenizer, turns, has_image)
    assert batch["input_ids"][0].tolist() == whole
    assert batch["labels"][0].tolist() == labels


class Asked:
    """Stands for a model, of which questions take the device alone."""

    device = torch.device("cpu")


def test_what_is_asked_is_what_was_trained_on(stock, processor):
    image = picture()
    for made, turn in itertools.product((stock, processor, build_processor()), TURNS):
        asked = prompt_inputs(Asked, made, turn.question, image)
        conversation = Conversation("a", image, (turn,))
        for share in (0.0, 1.0):
            batch = Packer(made, 500, dialogue_share=share)([conversation])
            start = int((batch["labels"][0] != IGNORE).nonzero()[0])
            assert batch["input_ids"][0, :start].tolist() == asked["input_ids"][0].tolist()
            assert batch["labels"][0, -1] == made.tokenizer.eos_token_id
            torch.testing.assert_close(batch["pixel_values"], asked["pixel_values"])


def test_later_questions_are_asked_as_they_were_trained_on(processor):
    batch = Packer(processor, 500, dialogue_share=1.0)([Conversation("a", picture(), TURNS)])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    starts = ((labels != IGNORE) & (labels.roll(1) == IGNORE)).nonzero().flatten().tolist()
    assert len(starts) == len(TURNS)
    for number, start in enumerate(starts):
        messages = []
        for place, turn in enumerate(TURNS[: number + 1]):
            image = [{"type": "image"}] if not place else []
            content = [*image, {"type": "text", "text": turn.question}]
            messages.append({"role": "user", "content": content})
            if place < number:
                answer = [{"type": "text", "text": turn.answer}]
                messages.append({"role": "assistant", "content": answer})
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        asked = processor(images=picture(), text=text, return_tensors="pt")["input_ids"][0]
        assert asked.tolist() == ids[:start].tolist()


def test_branches_are_single_prompts(tokenizer, processor):
    """Behind one image, with a question that begins like the template's own text."""
    turns = (*TURNS, Turn("\nASSISTANT: what?", "No."))
    batch = Packer(processor, 500)([Conversation("a", picture(), turns)])
    seen = batch["attention_mask"][0, 0]
    for row in (batch["labels"][0] == tokenizer.eos_token_id).nonzero().flatten().tolist():
        turn = turns[[*(batch["labels"][0, :row] == tokenizer.eos_token_id)].count(True)]
        own = batch["input_ids"][0, seen[row]].tolist()
        assert own == authors_ids(tokenizer, [turn], True)[0]
        assert batch["position_ids"][0, seen[row]].tolist() == [*range(len(own))]


def test_a_template_that_merges_question_and_answer_keeps_the_question(stock):
    """Its prompts end in a blank, which tokenizers join with the word behind it."""
    merging = LlavaProcessor(
        stock.image_processor,
        stock.tokenizer,
        patch_size=stock.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] "
            "if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
            "{{ '' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    )
    turn = Turn("What color is it?", "red one")
    asked = prompt_inputs(Asked, merging, turn.question)["input_ids"][0].tolist()
    for share in (0.0, 1.0):
        batch = Packer(merging, 500, share)([Conversation("a", None, (turn,))])
        assert batch["input_ids"][0, : len(asked)].tolist() == asked
        assert (batch["labels"][0] != IGNORE).tolist().index(True) == len(asked)


def test_pictures_are_padded_with_the_mean_colour(processor, stock):
    image = picture(40, 20)
    mean = processor.image_processor.image_mean
    square = Image.new("RGB", (40, 40), tuple(int(value * 255) for value in mean))
    square.paste(image, (0, 10))
    found = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    expected = stock.image_processor(square, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected)
    # Above and below the picture there is the mean colour, which becomes about zero.
    assert found[0, :, 2].abs().max() < 0.02
    assert not torch.allclose(
        found, stock.image_processor(image, return_tensors="pt")["pixel_values"]
    )


def test_pictures_that_are_cut_into_tiles_are_refused(stock):
    """How many tokens they take depends on their shape."""
    side = {"height": WIDTH, "width": WIDTH}
    tiled = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": WIDTH}, crop_size=side, image_grid_pinpoints=[[56, 56]]
        ),
        stock.tokenizer,
        patch_size=WIDTH // 2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=stock.chat_template,
    )
    with pytest.raises(InputError, match="those of LlavaNextProcessor do not"):
        Packer(tiled, 500)


def test_what_cannot_be_a_prompt_is_one_sentence(stock, tokenizer):
    with pytest.raises(InputError, match=r"LLaVA-1\.5 are for its processor, not"):
        as_llava_v1(tokenizer)
    with pytest.raises(InputError, match="max_text_tokens=9 is less than a prompt"):
        Packer(as_llava_v1(stock), 9)
    bare = as_llava_v1(stock)
    bare.chat_template = None
    with pytest.raises(InputError, match="set prompt=llava-v1"):
        Packer(bare, 50)
