"""tiny-llava behind a server of its own, on loopback."""

import copy

import openai
import pytest
from chats import running
from small_clip import write_clip

from planner.loading import load_model
from planner.serving.chat_prompts import PromptLimits
from planner.serving.engine import EngineLimits
from planner.serving.http_app import http_app
from planner.serving.opening import open_service


@pytest.fixture(scope="session")
def tiny():
    model, processor, _ = load_model("tiny-llava")
    return model, processor


@pytest.fixture(scope="session")
def service(tiny):
    return open_service(
        "tiny-llava", *tiny, [0.6, 1.0],
        prompts=PromptLimits(256, images=3, pixels=10**6), limits=EngineLimits(answers=4),
        utilities="prior",
    )  # fmt: skip


@pytest.fixture(scope="session")
def address(service):
    with running(http_app(service, ["first-key", "second-key"], 2**20)) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="second-key", max_retries=0) as client:
        yield client


@pytest.fixture
def guided(tiny, tmp_path):
    """(client, service, model) of one that keeps the patches that a question is about."""
    model = copy.deepcopy(tiny[0])
    service = open_service(
        "tiny-llava", model, tiny[1], [1.0],
        prompts=PromptLimits(256, images=3, pixels=10**6), limits=EngineLimits(answers=4),
        utilities="prior", tokens=f"cdpruner:keep=9,clip={write_clip(tmp_path, 128)}",
    )  # fmt: skip
    with (
        running(http_app(service, ["key"], 2**20)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0) as client,
    ):
        yield client, service, model
