"""What is said over HTTP: the part of OpenAI's chat completions that a server of planner takes.

https://platform.openai.com/docs/api-reference/chat. Own fields: `budget` and `deadline_ms` of a
request; `cost` and `plan` of its usage.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Bytes of a prompt's texts are bounded by the body, messages and parts by these.
_MOST_MESSAGES, _MOST_PARTS = 256, 256


class TextPart(BaseModel):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """Where a picture is: a data URL, or a remote one where the server allows them."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(BaseModel):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """What somebody said."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=_MOST_PARTS)]


class StreamOptions(BaseModel):
    """Of ``stream``."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a chat completion; fields that are not served are refused, not overlooked."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    n: Literal[1] = 1
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
