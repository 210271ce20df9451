"""A server whose prompts a scheduler plans."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from chats import COLOURS, QUESTION, ask, messages, running
from PIL import Image
from small_clip import write_clip
from small_llava import write_small_llava

import planner
from planner.ir.cost import Workload
from planner.ir.errors import PlannerError
from planner.ir.lowering import lower_model
from planner.loading import load_model
from planner.models.scheduling import Scheduled, Scheduler
from planner.planning.selectors import stages_of
from planner.serving.chat_format import Message
from planner.serving.chat_prompts import PromptLimits
from planner.serving.engine import EngineLimits
from planner.serving.http_app import http_app
from planner.serving.opening import open_service
from planner.serving.running_batch import Sampler


@pytest.fixture(
    scope="module",
    params=[("tokens,layers,heads,mlp", ""), ("adallava-l", ""), ("layers,heads,mlp", "cdpruner")],
)
def served(request, tmp_path_factory):
    switches, tokens = request.param
    model, processor, _ = load_model(str(write_small_llava(tmp_path_factory.mktemp("small"))))
    graph = lower_model(model, "small")
    torch.manual_seed(1)
    if tokens:
        width = model.config.vision_config.hidden_size
        tokens += f":keep=40,clip={write_clip(tmp_path_factory.mktemp('clip'), width)}"
    scheduler = Scheduler.of(graph, switches).eval()
    for parameter in scheduler.parameters():
        parameter.data.normal_(std=0.5)
    scheduled = Scheduled(model, graph, scheduler)
    service = open_service(
        "tiny-llava", model, processor, [0.75, 1.0], scheduled=scheduled,
        prompts=PromptLimits(256, images=1, pixels=10**6), limits=EngineLimits(answers=4),
        tokens=tokens,
    )  # fmt: skip
    # One of its own: the server's is for the server.
    return service, processor, Scheduled(model, graph, scheduler), tokens


def test_waits_are_counted_one_by_one_as_a_scheduler_reads(served):
    engine = served[0].engine
    assert (engine.limits.prompts, engine._waiting.together) == (8, 1)


class Failing(Sampler):
    """Of a request whose logits cannot be drawn from."""

    def distribution(self, logits):
        raise PlannerError("this one")


def test_a_prompt_that_fails_leaves_the_seeds_of_others_as_they_were(served):
    service, logits = served[0], torch.zeros(1, 50)
    batch, rung = service.engine._batch, service.engine.ladder.rungs[-1]
    prompt = service._reader.read([Message(**each) for each in messages(COLOURS[0])])
    seeded, fresh = Sampler(1.5, seed=7), Sampler(1.5, seed=7)
    with pytest.raises(PlannerError, match="this one"):
        batch.read([prompt.inputs] * 2, [rung] * 2, [seeded, Failing(0.0)], [prompt.asked] * 2)
    assert not batch.answers
    distribution = seeded.distribution(logits)
    assert [seeded.draw(distribution) for _ in range(8)] == [
        fresh.draw(distribution) for _ in range(8)
    ]


def by_generate(served, colour, budget, text, most):
    """The same answer by stock `generate` under the scheduler, and its plan."""
    _, processor, scheduled, tokens = served
    spoken = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(spoken, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=prompt, images=Image.new("RGB", (56, 56), colour), return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    load = Workload.default(scheduled.graph, 49, length - 49, 0)
    stages = stages_of(tokens, 49, 49)
    with torch.no_grad(), scheduled.using(budget, stages, load), planner.question(text):
        ids = scheduled.model.generate(**inputs, max_new_tokens=most, do_sample=False)
        kept = {str(n): counts[0] for n, counts in scheduled.kept_image_tokens.items()}
        (plan,) = scheduled.plans()
    return processor.decode(ids[0, length:], skip_special_tokens=True), plan, kept


def test_every_prompt_has_the_plan_and_the_answer_of_generate(served):
    """Answers of plans and lengths of their own, decoded together."""
    asked = [
        (COLOURS[n % 3], (0.75, 1.0)[n % 2], " ".join(["how"] * (n % 5) + [QUESTION]), 1 + n % 7)
        for n in range(12)
    ]
    expected = [by_generate(served, *row) for row in asked]
    assert len({plan.key for _, plan, _ in expected}) > 1
    with (
        running(http_app(served[0], [], 2**20)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = list(
            pool.map(lambda r: ask(client, r[0], text=r[2], most=r[3], budget=r[1]), asked)
        )
        hurried = ask(client, COLOURS[0], most=4, deadline_ms=60_000)
        if served[2].scheduler.vision is not None:
            # A few words do not pay for the latency token.
            with pytest.raises(openai.BadRequestError, match="less than") as refused:
                ask(client, text="how", most=2, budget=0.75)
            assert refused.value.status_code == 400
    for answer, (text, plan, kept), row in zip(answers, expected, asked, strict=True):
        assert answer.choices[0].message.content == text
        assert answer.usage.plan["budget"] == row[1]
        assert answer.usage.plan["layers_off"] == list(plan.layers_off)
        assert answer.usage.plan["image_tokens"] == kept
    assert hurried.usage.plan["budget"] == 1.0
