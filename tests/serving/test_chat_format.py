"""What requests may say, and how they are told that they may not."""

import re
from pathlib import Path

import pytest
from chats import messages, posted, question
from pydantic import ValidationError

from planner.serving.chat_format import ChatRequest, place_of

ROOT = Path(__file__).parents[2]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def body(**own):
    return {"model": "tiny-llava", "messages": messages(), **own}


def said(content="what", **own):
    return body(messages=[{"role": "user", "content": content, **own}])


@pytest.mark.parametrize(
    "given",
    [
        body(user="somebody", n=1, budget=1, temperature=0, stop="a", seed=-1),
        body(stop=["a", "b", "c", "d"], stream=True, stream_options={"include_usage": True}),
        said(name="somebody"),
        said([{**IMAGE, "image_url": {"url": "u", "detail": "low"}}]),
        # As `model_dump()` of the official client's answers has them.
        said(role="assistant", refusal=None, tool_calls=None, audio=None, annotations=None),
        said([{"type": "text", "text": "what", "more": None}]),
        body(**dict.fromkeys(
            ("max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "stream_options",
             "user", "budget", "deadline_ms", "tools", "logit_bias", "response_format")
        )),
        body(stream_options={"include_usage": None}),
    ],
)  # fmt: skip
def test_what_clients_send_is_taken(given):
    request = ChatRequest.model_validate(given)
    assert ChatRequest(**request.model_dump()) == request


def test_nulls_are_defaults():
    given = ChatRequest.model_validate(body(top_p=None, n=None, stream=None))
    assert (given.top_p, given.n, given.stream) == (1, 1, False)


@pytest.mark.parametrize(
    ("given", "place", "why"),
    [
        (body(stop=list("abcde")), "stop", "at most 4"),
        (body(stop=5), "stop", "string"),
        (body(stop=["a", 5]), "stop.1", "string"),
        (body(budget=True), "budget", "number"),
        (body(budget="0.5"), "budget", "number"),
        (body(budget=10**400), "budget", "number"),
        (body(deadline_ms=float("inf")), "deadline_ms", "finite"),
        (body(n=True), "n", "integer"),
        (body(n=2), "n", "1"),
        (body(max_tokens=1.0), "max_tokens", "integer"),
        (body(seed=True), "seed", "integer"),
        (body(stream=1), "stream", "boolean"),
        (body(tools=[]), "tools", ""),
        (body(stream_options={"x": 1}), "stream_options.x", ""),
        (said(tool_calls=[]), "messages.0.tool_calls", ""),
        (said(None), "messages.0.content", "required"),
        (said(5), "messages.0.content", "string"),
        (said([{"type": "audio"}]), "messages.0.content.0", "'text' or 'image_url'"),
        (said([5]), "messages.0.content.0", "'text' or 'image_url'"),
        (said([{"type": "text"}]), "messages.0.content.0.text", "required"),
        (said([{"type": "text", "text": "a", "x": 1}]), "messages.0.content.0.x", ""),
        (said([IMAGE | {"x": 1}]), "messages.0.content.0.x", ""),
        (said([{**IMAGE, "image_url": {"url": "u", "x": 1}}]),
         "messages.0.content.0.image_url.x", ""),
        (said([{**IMAGE, "image_url": "u"}]), "messages.0.content.0.image_url", "dictionary"),
        (said([IMAGE] * 300), "messages.0.content", "at most 256"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_its_place(given, place, why):
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(given)
    (error,) = caught.value.errors()
    assert place_of(error["loc"]) == place
    assert why in error["msg"]


def test_the_documents_name_every_field():
    table = (
        (ROOT / "docs" / "serving.md").read_text().partition("| field |")[2].partition("\n\n")[0]
    )
    named = set(re.findall(r"`(\w+)", table))
    assert set(ChatRequest.model_fields) <= named


@pytest.mark.parametrize(
    "own",
    [
        {"model": "é" * 3000},
        {"x" * 3000: 1},
        said([{**IMAGE, "image_url": {"url": "\U0001f600" * 3000}}]),
        {"messages": [{"role": "user" * 1000, "content": "how"}]},
        {"messages": [{"role": "user", "content": "how", "\t" * 3000: 1}]},
    ],
)  # fmt: skip
def test_a_refusal_repeats_little_of_the_request(address, own):
    with posted(address, question(**own)) as connection:
        answer = connection.getresponse()
        contents = answer.read()
    assert answer.status in (400, 404)
    assert len(contents.decode()) < 500
