"""What a server refuses, and what it lets go of."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import apart
import httpcore
import openai
import pytest
import torch
from chats import COLOURS, ask, data_url, eventually, messages, posted, question, value_of

from planner.ir.errors import InputError, PlannerError
from planner.planning.request import Request
from planner.serving import opening
from planner.serving.chat_prompts import PromptLimits, PromptReader
from planner.serving.engine import Engine, EngineLimits
from planner.serving.governor import Deadline, PromptSize
from planner.serving.jobs import Busy, Failed, Job
from planner.serving.opening import ServiceSettings, load_service
from planner.serving.pictures import fetch, is_public
from planner.serving.waiting import Place, Waiting
from planner.serving.warm_up import measure_rungs


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(address, service, monkeypatch, stream):
    """The answer would have taken half a minute."""
    batch = service.engine._batch
    step = batch.step
    monkeypatch.setattr(service.engine, "_ends", frozenset())
    monkeypatch.setattr(batch, "step", lambda: (time.sleep(0.2), step()))

    def aborted():
        return value_of(address, "vllm:request_success_total", finished_reason="abort")

    before = aborted()
    with posted(address, question(stream=stream)) as connection:
        assert eventually(lambda: value_of(address, "vllm:num_requests_running") == 1)
        if stream:
            connection.getresponse().close()
    assert eventually(lambda: aborted() == before + 1)
    assert eventually(lambda: value_of(address, "vllm:num_requests_running") == 0)


def test_a_full_queue_says_when_to_come_again(client, service, monkeypatch):
    monkeypatch.setattr(service.engine, "limits", EngineLimits(answers=4, waiting=0))
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client)
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_a_deadline_that_is_too_late_by_now_is_refused_at_once(client, service, monkeypatch):
    """One that the idle machine would keep, behind a minute of work: its prompt is not read."""
    monkeypatch.setattr(service.engine, "_seconds_to_begin", lambda: 60.0)
    monkeypatch.setattr(service.engine, "_seconds_to_place", lambda: 60.0)
    read, prompts = service._reader.read, []
    monkeypatch.setattr(
        service._reader, "read", lambda *given: (prompts.append(1), read(*given))[1]
    )
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, deadline_ms=30_000)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "60"
    assert not prompts
    assert ask(client, deadline_ms=90_000).usage.plan["budget"] == 1
    assert prompts


def test_prompts_that_are_made_ready_stand_before_a_deadline_too(service, monkeypatch):
    engine, deadline = service.engine, Deadline(whole=60.0)
    monkeypatch.setattr(engine, "limits", EngineLimits(answers=4, waiting=10**9))
    monkeypatch.setattr(engine, "_reserved", [Place(math.inf, 0.0, 0, PromptSize(0))] * 10**5)
    late = engine.place(deadline, time.monotonic())
    with pytest.raises(Busy, match="cannot be kept"):
        late.__enter__()


@pytest.mark.parametrize("where", ["_let_go", "_next_jobs", "_rungs_of"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_leaves_nobody_waiting(service, monkeypatch, where):
    """Beyond a failure of the model, which ends the answers concerned alone."""
    known = service.engine
    engine = Engine(
        known._batch, known._tokenizer, known.ladder, known._governor, 100, known.metrics,
        EngineLimits(),
    )  # fmt: skip
    monkeypatch.setattr(engine, where, lambda *_: 1 / 0)
    inputs = {"input_ids": torch.zeros(1, 20, dtype=torch.int64)}
    said, prompt = [], SimpleNamespace(size=PromptSize(20), tokens=20, inputs=inputs, asked=None)
    jobs = [Job(prompt, 4, 0, None, said.append) for _ in range(2)]
    for job in jobs:
        engine.submit(job)
    engine.start()
    engine._thread.join(20)
    assert [type(event) for event in said] == [Failed, Failed]
    assert not engine.is_healthy
    with pytest.raises(Busy, match="stopping"):
        engine.submit(jobs[0])


def test_what_a_service_holds_for_good_is_no_matter_of_garbage_collection(monkeypatch):
    loaded = [["a model"]]
    monkeypatch.setattr(opening, "load_model", lambda *args: (None, None, None))
    monkeypatch.setattr(opening, "prompt_limits", lambda *args: None)
    monkeypatch.setattr(opening, "open_service", lambda *args, **options: loaded)
    before = gc.get_freeze_count()
    try:
        assert load_service(ServiceSettings(Request("tiny-llava"), (1.0,))) is loaded
        assert gc.get_freeze_count() > before
        assert all(each is not loaded for each in gc.get_objects())
    finally:
        gc.unfreeze()


def test_a_request_out_of_time_is_ended(client, service, monkeypatch):
    monkeypatch.setattr(service.engine, "limits", EngineLimits(answers=4, seconds=1e-6))
    with pytest.raises(openai.InternalServerError, match="no answer within"):
        ask(client)


def test_a_schema_s_requests_crash_nothing(address, tmp_path):
    """Schemathesis makes requests of the published schema, good and bad."""
    with urlopen(f"{address}/openapi.json") as answer:
        schema = json.load(answer)
    # Else hardly any request would come as far as the model, or soon be answered.
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    fields["model"]["const"] = "tiny-llava"
    for name in ("max_tokens", "max_completion_tokens"):
        fields[name]["anyOf"][0]["maximum"] = 3
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    done = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"), "run", "schema.json",
            "--url", address, "--header", "Authorization: Bearer first-key", "--seed", "1",
            "--checks", "not_a_server_error,content_type_conformance,response_schema_conformance",
            "--max-examples", "5", "--request-timeout", "20", "--phases", "coverage,fuzzing",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_command_serves_and_finishes_answers_when_it_is_stopped(tmp_path):
    """SIGTERM comes in the middle of an answer."""
    command = ["-m", "planner", "serve", "-m", "tiny-llava", "--port", "0"]
    server = apart.start(*command, "--budgets", "1", "--utilities", "prior", folder=tmp_path)
    try:
        assert eventually(lambda: "\n" in server.said or not server.process.is_alive(), 60)
        base = server.said.rpartition(" ")[2].strip()
        assert base.startswith("http://127.0.0.1:"), server.said
        client = openai.OpenAI(base_url=base, api_key="none", max_retries=0)
        with client, client.chat.completions.create(
            model="tiny-llava", messages=messages(COLOURS[0]), stream=True
        ) as stream:  # fmt: skip
            first = next(stream)
            os.kill(server.process.pid, signal.SIGTERM)
            rest = list(stream)
        assert first.choices[0].delta.role == "assistant"
        assert rest[-1].choices[0].finish_reason == "stop"
    finally:
        done = server.finish(60)
    # It ended by itself.
    assert done.returncode != -signal.SIGKILL


def test_bodies_are_bounded(address):
    with posted(address, b'"' + b"x" * 2**20 + b'"') as connection:
        answer = connection.getresponse()
        assert answer.status == 413
        assert b"more than 1048576 bytes" in answer.read()
    for body in (b"", b"{", b"[]", b'{"model": "tiny-llava"}', b"\xff"):
        with posted(address, body) as connection:
            answer = connection.getresponse()
            assert answer.status == 400
            assert json.loads(answer.read())["error"]["message"]


@pytest.mark.parametrize("tokens", [2, 3])
def test_a_limit_that_no_prompt_keeps_is_refused_at_the_start(tiny, service, tokens):
    reader = PromptReader(*tiny, PromptLimits(tokens))
    engine = service.engine
    try:
        with pytest.raises(InputError, match=f"^{tokens} tokens are too few .* one word takes"):
            measure_rungs(engine._batch, engine.ladder, reader, lambda _: None)
    finally:
        reader.template.stop()


def test_pictures_are_bounded(client):
    def send(url):
        client.chat.completions.create(
            model="tiny-llava",
            messages=[
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
            ],
        )

    for url, said in (
        (data_url((0, 0, 0), 1100), "pixels"),
        ("data:image/png;base64,AAAA", "broken"),
        ("data:image/png;base64,!", "base64"),
        ("http://127.0.0.1/x.png", "fetches no images"),
        ("file:///etc/passwd", "no URL"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            send(url)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1",
     "::ffff:10.0.0.1", "fe80::1%eth0", "fd00::1", "64:ff9b::a00:1", "2002:0a00:0001::", "none"],
)  # fmt: skip
def test_private_addresses_are_not_public(address):
    assert not is_public(address)


def test_public_addresses_are():
    assert is_public("93.184.215.14")
    assert is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")
    assert is_public("64:ff9b::5db8:d70e")


def test_no_private_address_is_fetched_from_by_name_or_redirect(address):
    for url in (f"{address}/health", address.replace("127.0.0.1", "localhost") + "/health"):
        with pytest.raises(InputError, match="not public"):
            fetch(url, 1000)
    # Redirects go through the same connections: here one that leads to no web address at all.
    answer = b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(InputError, match="not http"):
        fetch("http://public.example/", 1000, httpcore.MockBackend([answer]))
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000
    with pytest.raises(InputError, match="more than 1000 bytes"):
        fetch("http://public.example/", 1000, httpcore.MockBackend([long]))


def test_metrics_count(client, address):
    before = value_of(address, "planner:answers_total", budget="0.6")
    tokens = value_of(address, "vllm:generation_tokens_total")
    spent = ask(client, COLOURS[0], budget=0.6, deadline_ms=60_000).usage.completion_tokens
    assert value_of(address, "planner:answers_total", budget="0.6") == before + 1
    assert value_of(address, "vllm:generation_tokens_total") == tokens + spent
    assert value_of(address, "planner:deadlines_total", kept="true") >= 1


def test_a_prompt_that_fails_fails_alone(client, service, monkeypatch):
    """Though it was read together with others."""
    batch = service.engine._batch
    read, sizes = batch.read, []

    def failing(prompts, *others):
        sizes.append(len(prompts))
        time.sleep(0.3)
        if any(prompt["input_ids"].shape[1] > 75 for prompt in prompts):
            raise PlannerError("this one")
        return read(prompts, *others)

    monkeypatch.setattr(batch, "read", failing)
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(ask, client, COLOURS[0]) for _ in range(3)]
        bad = pool.submit(ask, client, COLOURS[0], text=" ".join(["how"] * 40))
        assert all(future.result().choices for future in good)
        with pytest.raises(openai.InternalServerError, match="this one"):
            bad.result()
    assert max(sizes) > 1


def test_under_load_deadlines_are_kept_by_cheaper_plans(client, service, monkeypatch):
    """Many at once, with time enough for the base model: those that come late get less of it."""
    batch = service.engine._batch
    step = batch.step
    monkeypatch.setattr(batch, "step", lambda: (time.sleep(0.01), step()))
    monkeypatch.setattr(Waiting, "late", lambda *_, **__: 0)
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, client, COLOURS[0], deadline_ms=60_000) for _ in range(16)]
        budgets = [future.result().usage.plan["budget"] for future in asked]
    assert set(budgets) == {0.6, 1.0}
