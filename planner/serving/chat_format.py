"""What is said over HTTP: the part of OpenAI's chat completions that a server of planner takes.

https://platform.openai.com/docs/api-reference/chat. Own fields: `budget` and `deadline_ms` of a
request; `cost` and `plan` of its usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

# Bytes of a prompt's texts are bounded by the body, messages and parts by these.
_MOST_MESSAGES, _MOST_PARTS = 256, 256


class _Asked(BaseModel):
    """Part of a request. Fields that are not served are refused, not overlooked, and so are values
    of another type; null is as if the field were left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


# Alternatives are told apart before they are tried: a refusal is about the one that is meant.
# These stand in the place that it names, where `place_of` leaves them out.
_TEXT, _LIST, _IMAGE = "<text>", "<list>", "<image_url>"


def place_of(parts: Sequence[str | int]) -> str:
    """A field of a request by the place that pydantic gives: ``messages.0.content.1.text``."""
    return ".".join(str(part) for part in parts if part not in (_TEXT, _LIST, _IMAGE))


def _text_or_list(given: Any) -> str:
    return _LIST if isinstance(given, list) else _TEXT


def _kind(given: Any) -> str | None:
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return f"<{kind}>" if kind in ("text", "image_url") else None


class TextPart(_Asked):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Asked):
    """Where a picture is: a data URL, or a remote one where the server allows them.

    `detail` changes nothing: how large a picture is seen is the model's.
    """

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Asked):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[
    Annotated[TextPart, Tag(_TEXT)] | Annotated[ImagePart, Tag(_IMAGE)],
    Discriminator(
        _kind,
        custom_error_type="part",
        custom_error_message="a part's type should be 'text' or 'image_url'",
    ),
]


class Message(_Asked):
    """What somebody said; chat templates are not told the `name`."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(_TEXT)]
        | Annotated[list[Part], Field(max_length=_MOST_PARTS), Tag(_LIST)],
        Discriminator(_text_or_list),
    ]
    name: str | None = None


class StreamOptions(_Asked):
    """Of ``stream``."""

    include_usage: bool = False


class ChatRequest(_Asked):
    """The body of a chat completion; `user` changes nothing."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[
            Annotated[str, Tag(_TEXT)] | Annotated[list[str], Field(max_length=4), Tag(_LIST)],
            Discriminator(_text_or_list),
        ]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=1)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    deadline_ms: Annotated[float, Field(gt=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class PlanUsed(BaseModel):
    """The plan that an answer was made under."""

    budget: float
    layers_off: list[int]
    image_tokens: dict[int, int]  # layer of a token stage -> image tokens left


class Usage(BaseModel):
    """What an answer took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cost: dict[str, dict[str, float]]
    plan: PlanUsed


class AnswerMessage(BaseModel):
    """The model's message, or what a chunk adds to it."""

    role: Literal["assistant"] | None = None
    content: str | None = None


FinishReason = Literal["stop", "length"]


class Choice(BaseModel):
    """The one answer."""

    index: int = 0
    message: AnswerMessage
    finish_reason: FinishReason


class ChunkChoice(BaseModel):
    """What a chunk adds to it."""

    index: int = 0
    delta: AnswerMessage
    finish_reason: FinishReason | None = None


class _Completion(BaseModel):
    id: str
    created: int
    model: str


class ChatCompletion(_Completion):
    """A whole answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]
    usage: Usage


class ChatChunk(_Completion):
    """A piece of a streamed answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ServedModel(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "planner"


class ServedModels(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class Failure(BaseModel):
    """What went wrong, in one sentence."""

    message: str
    type: str
    code: str | None = None
    param: Any = None


class FailureBody(BaseModel):
    """The body of every answer that is none."""

    error: Failure
