"""Prompts are made ready while somebody waits for them, and nobody waits for another's pictures."""

import asyncio
import copy
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import httpcore
import openai
import pytest
from chats import COLOURS, ask, data_url, eventually, posted, question, value_of

from planner.ir.errors import InputError
from planner.serving import chat_prompts
from planner.serving.chat_format import Message
from planner.serving.chat_prompts import PromptLimits, PromptReader
from planner.serving.engine import EngineLimits
from planner.serving.jobs import Busy
from planner.serving.pictures import fetch
from planner.serving.reading import Reading, Wait

LARGE = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": data_url(colour, 1000)}}
            for colour in COLOURS
        ],
    }
]

LARGE_QUESTION = question(messages=LARGE, max_tokens=1)


@pytest.fixture
def decoded(service, monkeypatch):
    """Sizes of large pictures that were decoded; `go` lets them be."""
    seen, go, decode = [], threading.Event(), chat_prompts.decode_image

    def slow(contents, name, most_pixels):
        image = decode(contents, name, most_pixels)
        if image.size == (1000, 1000):
            seen.append(image.size)
            assert go.wait(60)
        return image

    monkeypatch.setattr(chat_prompts, "decode_image", slow)
    monkeypatch.setattr(service._reading, "_seconds_per_pixel", 0.0)
    yield SimpleNamespace(seen=seen, go=go)
    go.set()


def test_large_pictures_keep_no_other_request_waiting(client, decoded):
    with ThreadPoolExecutor(3) as pool:
        large = [
            pool.submit(
                client.chat.completions.create, model="tiny-llava", messages=LARGE, max_tokens=1
            )
            for _ in range(3)
        ]
        assert eventually(lambda: decoded.seen)
        assert ask(client, COLOURS[0]).choices
        assert not any(future.done() for future in large)
        decoded.go.set()
        assert all(future.result().choices for future in large)
    assert len(decoded.seen) == 9


def test_pictures_of_clients_that_have_gone_are_not_decoded(address, client, service, decoded):
    def aborted():
        return value_of(address, "vllm:request_success_total", finished_reason="abort")

    before = aborted()
    for _ in range(3):
        with posted(address, LARGE_QUESTION):
            assert eventually(lambda: service._reading._pixels and decoded.seen)
        assert eventually(lambda: not service._reading._pixels)
    assert eventually(lambda: aborted() == before + 3)
    decoded.go.set()
    answer = client.chat.completions.create(model="tiny-llava", messages=LARGE, max_tokens=1)
    assert answer.choices
    # One was being decoded as its client went away.
    assert len(decoded.seen) == 1 + 3


def test_time_runs_out_while_a_prompt_waits(client, address, service, decoded, monkeypatch):
    def refused(error, said, **own):
        begun = time.monotonic()
        with pytest.raises(error, match=said) as caught:
            client.chat.completions.create(
                model="tiny-llava", messages=LARGE, max_tokens=1, extra_body=own
            )
        assert time.monotonic() - begun < 5
        assert int(caught.value.response.headers["retry-after"]) >= 1

    with posted(address, LARGE_QUESTION):
        assert eventually(lambda: decoded.seen)
        refused(openai.InternalServerError, "deadline cannot be kept", deadline_ms=500)
        with monkeypatch.context() as patch:
            patch.setattr(service.engine, "limits", EngineLimits(answers=4, seconds=0.5))
            refused(openai.InternalServerError, "no answer within 0.5 seconds")
        # What waits already takes longer than anybody has.
        monkeypatch.setattr(service._reading, "_seconds_per_pixel", 1e-3)
        refused(openai.RateLimitError, "large images")
    assert len(decoded.seen) == 1
    decoded.go.set()
    assert eventually(lambda: not service._reading._pixels)
    # Where nothing does, a slow moment is forgotten.
    answer = client.chat.completions.create(model="tiny-llava", messages=LARGE, max_tokens=1)
    assert answer.choices


def test_a_picture_that_is_fetched_keeps_no_other_request_waiting():
    """Of more requests than there are threads that fetch."""
    go = threading.Event()

    class Reader:
        template = SimpleNamespace(start=lambda: None, stop=lambda: None)

        def another(self):
            return self

        def files(self, messages, check):
            if isinstance(messages[0].content, list):
                assert go.wait(60)
            return []

        def read(self, messages, files, check):
            return messages[0].role

    async def asked():
        reading = Reading(Reader())
        picture = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
        remote, own = [Message(role="user", content=[picture])], [Message(role="user", content="")]

        def prompt(messages):
            ends = time.monotonic() + 60
            return asyncio.create_task(
                reading.prompt(messages, Wait(ends, Busy("late", "timeout", 1)))
            )

        async def later(messages):
            return await asyncio.gather(prompt(messages), return_exceptions=True)

        fetched = [prompt(remote) for _ in range(20)]
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(prompt(own), 20) == "user"
        assert not any(task.done() for task in fetched)
        go.set()
        assert await asyncio.gather(*fetched) == ["user"] * 20
        go.clear()
        fetched = [prompt(remote) for _ in range(20)]
        await asyncio.sleep(0.1)
        reading.give_up()
        for each in [*await asyncio.gather(*fetched, return_exceptions=True), *await later(own)]:
            assert isinstance(each, Busy)
            assert str(each) == "the server is stopping"
        go.set()
        reading.stop()

    asyncio.run(asked())


class Loopback(httpcore.NetworkBackend):
    """Connects to a server of the test, whatever is asked for."""

    def __init__(self, port):
        self.port = port

    def connect_tcp(
        self, host, port, timeout=None, local_address=None, socket_options=None
    ):  # fmt: skip
        return httpcore.SyncBackend().connect_tcp("127.0.0.1", self.port, timeout)


@contextmanager
def dripping(first):
    """A server that says something at once, and then a byte every 50 ms."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                try:
                    connection.sendall(first)
                    while True:
                        connection.sendall(b"x")
                        time.sleep(0.05)
                except OSError:
                    pass

        thread = threading.Thread(target=drip)
        thread.start()
        yield server.getsockname()[1]
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "first", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: "]
)
def test_a_fetch_ends_however_slowly_it_goes_on(first):
    begun = time.monotonic()
    with (
        dripping(first) as port,
        pytest.raises(InputError, match=r"not read within 0\.5 seconds"),
    ):
        fetch("http://public.example/a.png", 10**6, Loopback(port), seconds=0.5)
    assert time.monotonic() - begun < 5


def test_a_chat_template_is_contained(tiny):
    """One that loops over some messages."""
    model, processor = tiny
    processor = copy.deepcopy(processor)
    processor.chat_template = (
        "{% if 'boom' in messages[0]['content']|string %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}how"
    )
    reader = PromptReader(model, processor, PromptLimits(64))
    reader.template._seconds = 0.5
    with pytest.raises(InputError, match="chat template does not end within"):
        reader.read([Message(role="user", content="boom")])
    assert reader.another().read([Message(role="user", content="no")]).tokens == 2
    reader.template.stop()
