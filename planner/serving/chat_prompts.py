"""Messages and pictures of a request become inputs of the model, within limits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from planner.contained import Container
from planner.ir.errors import InputError, first_line
from planner.loading import count_image_tokens, decode_image
from planner.serving.chat_format import ImagePart, Message
from planner.serving.governor import PromptSize
from planner.serving.pictures import is_remote, picture_file

T = TypeVar("T")

# No tokenizer makes fewer tokens of this many letters than one, spaces aside.
_LETTERS_PER_TOKEN = 32
# Of a prompt that a chat template makes, beside those of its messages; a letter has 4 bytes.
_TEMPLATE_BYTES, _LETTER_BYTES = 1 << 20, 4


@dataclass(frozen=True)
class PromptLimits:
    """What a prompt may hold."""

    tokens: int  # of prompt and answer together
    images: int = 8  # of a request
    pixels: int = 16_000_000  # of an image
    image_bytes: int = 16 * 2**20  # of a remote image
    remote_images: bool = False  # whether images are fetched from the open internet


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model takes it."""

    inputs: dict[str, Any]  # a batch of one, on the CPU
    tokens: int  # of images too
    image_tokens: int
    asked: tuple[str, ...]  # about each picture

    @property
    def size(self) -> PromptSize:
        """How long it is."""
        return PromptSize(self.tokens - self.image_tokens, self.image_tokens)


class PromptReader:
    """Makes prompts of messages by the model's own chat template and processor.

    The template, which is code that comes with the model, runs in a `Container`. Not for several
    threads at once: fast tokenizers are not. InputError without a chat template.
    """

    def __init__(self, model: Any, processor: Any, limits: PromptLimits) -> None:
        if not getattr(processor, "chat_template", None):
            raise InputError("the model has no chat template, so it cannot be chatted with")
        self.limits = limits
        self._model, self._processor = model, copy.deepcopy(processor)
        self.takes_images = hasattr(processor, "image_processor")
        self.template = Container(
            _template_of(self._processor),
            "the model's chat template",
            most_text=_TEMPLATE_BYTES + _LETTER_BYTES * _LETTERS_PER_TOKEN * limits.tokens,
        )

    def another(self) -> PromptReader:
        """One for another thread; the template's container is shared."""
        other = copy.copy(self)
        other._processor = copy.deepcopy(self._processor)
        return other

    def files(
        self, messages: Sequence[Message], check: Callable[[], None] = lambda: None
    ) -> list[bytes]:
        """The files of all pictures, which is all that is done about them when they are large.

        InputError where they cannot be had, or messages are beyond the limits. `check` is called
        before each picture, and may raise.
        """
        letters = sum(len(text) for message in messages for text in _texts(message))
        if letters > self.limits.tokens * _LETTERS_PER_TOKEN:
            raise InputError(
                f"a prompt of {letters} letters is more than the {self.limits.tokens} tokens that "
                "there is room for"
            )
        urls, limits = picture_urls(messages), self.limits
        if urls and not self.takes_images:
            raise InputError("the model takes no images")
        if len(urls) > limits.images:
            raise InputError(f"{len(urls)} images are more than {limits.images}")
        files = []
        for name, url in _named(urls):
            check()
            files.append(picture_file(url, name, limits.image_bytes, limits.remote_images))
        return files

    def read(
        self,
        messages: Sequence[Message],
        files: Sequence[bytes] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Prompt:
        """The prompt of some messages; InputError where it is beyond the limits, or not what the
        model takes.

        Args:
            messages: of a request.
            files: what `files` gave for them, if it has been asked.
            check: called before each step that may take long; it may raise.
        """
        pictures = []
        for name, contents in _named(self.files(messages, check) if files is None else files):
            check()
            pictures.append(decode_image(contents, name, self.limits.pixels))
        arguments: dict[str, Any] = {"images": pictures} if pictures else {}
        check()
        text = self.template(json.dumps([self._spoken(message) for message in messages]))
        check()
        try:
            inputs = dict(self._processor(text=text, return_tensors="pt", **arguments))
        except Exception as error:
            raise InputError(f"the model refuses the messages: {first_line(error)}") from None
        tokens = int(inputs["input_ids"].shape[1])
        if not tokens:
            raise InputError("the prompt is empty")
        image_tokens = count_image_tokens(self._model, inputs)
        return Prompt(inputs, tokens, image_tokens, tuple(_questions(messages)))

    def _spoken(self, message: Message) -> dict[str, Any]:
        """A message as chat templates take it; those of text models want one text."""
        if not self.takes_images:
            return {"role": message.role, "content": "\n".join(_texts(message))}
        parts = [message.content] if isinstance(message.content, str) else message.content
        content = [
            {"type": "image"}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": part if isinstance(part, str) else part.text}
            for part in parts
        ]
        return {"role": message.role, "content": content}


def _template_of(processor: Any) -> Callable[[str], str]:
    """The chat template as a function of messages in JSON."""

    def templated(messages: str) -> str:
        text: str = processor.apply_chat_template(
            json.loads(messages), add_generation_prompt=True, tokenize=False
        )
        return text

    return templated


def picture_urls(messages: Sequence[Message]) -> list[str]:
    """Where the pictures of messages are."""
    return [
        part.image_url.url
        for message in messages
        if not isinstance(message.content, str)
        for part in message.content
        if isinstance(part, ImagePart)
    ]


def has_remote_pictures(messages: Sequence[Message]) -> bool:
    """Whether some picture has to be fetched."""
    return any(map(is_remote, picture_urls(messages)))


def _named(things: Sequence[T]) -> Iterator[tuple[str, T]]:
    """Pictures of a request with their names, for messages."""
    return ((f"number {n}", thing) for n, thing in enumerate(things, 1))


def _questions(messages: Sequence[Message]) -> Iterator[str]:
    """What is asked about each picture: the text beside it, or else the last of all."""
    texts = ["\n".join(_texts(message)) for message in messages]
    last = next((text for text in reversed(texts) if text), "")
    for message, text in zip(messages, texts, strict=True):
        if not isinstance(message.content, str):
            yield from (text or last for part in message.content if isinstance(part, ImagePart))


def _texts(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content if not isinstance(part, ImagePart)]
