"""Tokenizer, image processor and prompt as the authors have them, as one stock processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlavaConfig, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import is_sentencepiece_available

from planner.documents import read_json
from planner.ir.errors import InputError, first_line

IMAGE, PAD = "<image>", "<pad>"
# The conversation "v1" of LLaVA-1.5's code, which AdaLLaVA and Dynamic-LLaVA use as well.
_PROMPT = (
    "{% if messages[0]['role'] != 'system' %}A chat between a curious user and an artificial "
    "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
    "user's questions. {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def stock_processor(folder: Path, config: LlavaConfig, tower: str, pads: bool) -> LlavaProcessor:
    """The processor of a checkpoint, whose tokenizer knows ``<image>`` and ``<pad>``.

    `tower`: folder of the vision tower, whose picture statistics are taken if it is there. `pads`:
    whether pictures are padded to a square with the mean colour, or else cut to one.
    """
    own_file = folder / "tokenizer.model"
    if own_file.exists() and not (folder / "tokenizer.json").exists():
        _require_sentencepiece(own_file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config.text_config)
    # Tokenizers raise errors of all kinds.
    except Exception as error:
        raise InputError(f"'{folder}' has no usable tokenizer: {first_line(error)}") from None
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.padding_side = "left"
    size = config.vision_config.image_size
    pictures: dict[str, Any] = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "do_pad": pads,
    }
    statistics = Path(tower) / "preprocessor_config.json"
    if statistics.is_file():
        known = read_json(statistics, "vision tower's preprocessor config")
        pictures |= {k: known[k] for k in ("image_mean", "image_std") if k in known}
    return LlavaProcessor(
        LlavaImageProcessorPil(**pictures),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=_template(tokenizer),
    )


def as_llava_v1(processor: Any) -> LlavaProcessor:
    """A LLaVA's processor with LLaVA-1.5's conversation "v1", and pictures padded to a square.

    The padding has the mean colour, as in the authors' code. Stock LLaVA-1.5 cuts pictures to a
    square, and its prompts have no system message. Raises InputError: the processor is no LLaVA's.
    """
    if not isinstance(processor, LlavaProcessor):
        raise InputError(
            f"prompts of LLaVA-1.5 are for its processor, not {type(processor).__name__}"
        )
    known = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    pictures = {name: getattr(processor.image_processor, name) for name in known}
    return LlavaProcessor(
        LlavaImageProcessorPil(**pictures, do_pad=True),
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        image_token=processor.image_token,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=_template(processor.tokenizer),
    )


def _template(tokenizer: Any) -> str:
    return _PROMPT.replace(IMAGE, _image_with_prefix(tokenizer))


def _image_with_prefix(tokenizer: Any) -> str:
    """``<image>``, and a space if the tokens behind it then are those of the authors.

    They tokenise what is before and behind a picture apart, and SentencePiece begins each text with
    a space of its own. Inside one text it does so at the very beginning alone.
    """
    apart, behind, spaced = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in ("\n", "<image>\n", "<image> \n")
    )
    return f"{IMAGE} " if apart != behind[1:] and apart == spaced[1:] else IMAGE


def _require_sentencepiece(path: Path) -> None:
    """Without it transformers takes the file for one of another format, and says that."""
    if not is_sentencepiece_available():
        raise InputError(
            f"reading '{path}' takes the package sentencepiece: pip install 'planner[convert]'"
        )
