"""Connections that are too slow, and answers that run when a server stops."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from types import SimpleNamespace
from unittest.mock import MagicMock
from urllib.request import urlopen

import apart
import pytest
import torch
from chats import COLOURS, eventually, messages, posted, question

from planner.serving import http_limits, http_server
from planner.serving.engine import Engine, EngineLimits
from planner.serving.governor import PromptSize
from planner.serving.http_app import http_app
from planner.serving.http_server import HttpServer, TimedConnection
from planner.serving.jobs import Busy, Failed, Job, Piece, stopping
from planner.serving.service import Asked, ChatService


class Endless(ChatService):
    """Answers without an end."""

    is_healthy = True

    def __init__(self):
        super().__init__("tiny-llava")
        self.asking = set()

    def start(self):
        pass

    def stop(self):
        pass

    def give_up(self):
        for asked in self.asking:
            asked.events.put_nowait(Failed(stopping()))

    def metrics_text(self):
        return b""

    @asynccontextmanager
    async def asked(self, request, ttft_ms, tpot_ms):
        asked = Asked()
        asked.events.put_nowait(Piece("how", 0))
        self.asking.add(asked)
        yield asked
        self.asking.discard(asked)

    def usage(self, asked, done):
        raise NotImplementedError


@contextmanager
def served(service, grace=0):
    """(address, server) of one in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = HttpServer(http_app(service), service, grace)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive()


def ended(connection, seconds=10):
    """Whether the other end hangs up, in time; and what it said before."""
    connection.settimeout(seconds)
    said = b""
    try:
        while part := connection.recv(1000):
            said += part
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False, said
    return True, said


def connected(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("begun", [b"", b"GET /hea", HEAD])
def test_a_header_that_does_not_end_ends_the_connection(monkeypatch, begun):
    """Though a byte of it comes again and again; also the second one of a connection."""
    monkeypatch.setattr(http_server, "_HEADER", 0.5)
    with served(Endless()) as (address, _), connected(address) as first:
        with connected(address) as second:
            second.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            second.settimeout(10)
            assert second.recv(1000).startswith(b"HTTP/1.1 200")
            second.sendall(begun)
            first.sendall(begun)
            for _ in range(4 if begun else 0):
                time.sleep(0.05)
                for each in (first, second):
                    each.sendall(b"X")
            assert ended(first)[0]
            # Without a byte of another request it is only kept alive.
            assert ended(second, 10 if begun else 1)[0] == bool(begun)
        with urlopen(f"{address}/health") as answer:
            assert answer.status == 200


def test_a_body_that_drips_is_refused(monkeypatch):
    monkeypatch.setattr(http_limits, "_WHOLE", 0.5)
    monkeypatch.setattr(http_server, "_HEADER", 0.5)
    with served(Endless()) as (address, _), connected(address) as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        connection.settimeout(0.05)
        begun, said = time.monotonic(), b""
        while not said and time.monotonic() - begun < 10:
            connection.sendall(b" ")
            with suppress(TimeoutError):
                said = connection.recv(1000)
        assert said.startswith(b"HTTP/1.1 408")
        # The rest of the body is not waited for either.
        assert ended(connection)[0]


def test_a_client_that_does_not_read_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(http_server, "_READING", 0.2)
    aborted = []

    class Transport(asyncio.Transport):
        def abort(self):
            aborted.append(True)

    async def paused(resumes):
        connection = TimedConnection.__new__(TimedConnection)
        connection._loop, connection._timers = asyncio.get_running_loop(), {}
        connection._inner = MagicMock()
        connection.connection_made(Transport())
        connection.pause_writing()
        if resumes:
            connection.resume_writing()
        await asyncio.sleep(0.5)
        connection.connection_lost(None)
        return len(aborted)

    assert asyncio.run(paused(True)) == 0
    assert asyncio.run(paused(False)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_run_beyond_the_grace_end_with_an_error(caplog, stream):
    service = Endless()
    with served(service) as (address, server), posted(address, question(stream=stream)) as asked:
        assert eventually(lambda: service.asking)
        if stream:
            answer = asked.getresponse()
            assert answer.readline().startswith(b"data: {")
        server.should_exit = True
        if not stream:
            answer = asked.getresponse()
        said = answer.read()
    if stream:
        last = said.decode().strip().rpartition("data: ")[2]
    else:
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) >= 1
        last = said
    assert json.loads(last)["error"]["message"] == "the server is stopping"
    assert not caplog.records


def test_a_client_that_never_sends_its_body_does_not_hold_up_the_end(monkeypatch, caplog):
    monkeypatch.setattr(http_server, "_FAREWELL", 1)
    with served(Endless()) as (address, server), connected(address) as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n{")
        time.sleep(0.3)
        begun, server.should_exit = time.monotonic(), True
        assert ended(connection)[0]
        assert time.monotonic() - begun < 10
    assert not caplog.records


def test_a_second_signal_ends_the_grace():
    service = Endless()
    with served(service, 60) as (address, server), posted(address, question()) as asked:
        assert eventually(lambda: service.asking)
        server.should_exit = True
        time.sleep(0.3)
        server.handle_exit(signal.SIGINT, None)
        assert asked.getresponse().status == 503


def test_an_engine_that_gives_up_tells_everyone_at_once(service):
    """Those that wait, and later ones; a job in no list is told by the engine's thread."""
    known = service.engine
    engine = Engine(
        known._batch, known._tokenizer, known.ladder, known._governor, 100, known.metrics,
        EngineLimits(),
    )  # fmt: skip
    inputs = {"input_ids": torch.zeros(1, 20, dtype=torch.int64)}
    said, prompt = [], SimpleNamespace(size=PromptSize(20), tokens=20, inputs=inputs, asked=None)
    jobs = [Job(prompt, 4, 0, None, said.append) for _ in range(3)]
    for job in jobs[:2]:
        engine.submit(job)
    engine.give_up()
    assert [str(event.error) for event in said] == ["the server is stopping"] * 2
    with pytest.raises(Busy, match="stopping"):
        engine.submit(jobs[2])
    engine._waiting.add(jobs[2])
    engine._let_go()
    assert [str(event.error) for event in said] == ["the server is stopping"] * 3


def test_the_command_tells_clients_that_it_stops(tmp_path):
    """Without a grace, in the middle of many answers."""
    command = ["-m", "planner", "serve", "-m", "tiny-llava", "--port", "0", "--grace", "0"]
    server = apart.start(*command, "--budgets", "1", "--utilities", "prior", folder=tmp_path)
    try:
        assert eventually(lambda: "\n" in server.said or not server.process.is_alive(), 90)
        address = server.said.rpartition(" ")[2].strip().removesuffix("/v1")

        def one(number):
            own = {"temperature": 2, "max_tokens": 300, "seed": number, "stream": number % 2 == 1}
            with posted(address, question(messages=messages(COLOURS[0]), **own)) as connection:
                answer = connection.getresponse()
                return answer.status, number % 2, answer.read()

        with ThreadPoolExecutor(24) as pool:
            asked = [pool.submit(one, number) for number in range(24)]
            assert eventually(lambda: any(future.done() for future in asked), 60)
            os.kill(server.process.pid, signal.SIGTERM)
            answers = [future.result() for future in asked]
    finally:
        done = server.finish(60)
    assert done.returncode != -signal.SIGKILL
    assert "Traceback" not in done.stderr
    assert "ERROR" not in done.stderr
    assert {status for status, _, _ in answers} <= {200, 503}
    stopped = [said for _, _, said in answers if b"the server is stopping" in said]
    assert stopped
    for status, is_stream, said in answers:
        if said not in stopped:
            assert status == 200
            assert not is_stream or said.endswith(b"data: [DONE]\n\n")
