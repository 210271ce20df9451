"""A server, asked by OpenAI's own client."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from chats import COLOURS, QUESTION, ask, messages
from PIL import Image

import planner


def by_generate(service, tiny, colour, budget, text=QUESTION, new_tokens=8):
    """The same answer by stock `generate` under the same plan."""
    model, processor = tiny
    spoken = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(spoken, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=prompt, images=Image.new("RGB", (56, 56), colour), return_tensors="pt")
    plan = next(rung.plan for rung in service.engine.ladder.rungs if rung.budget == budget)
    with torch.no_grad(), planner.budget(model, plan):
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("budget", [0.6, 1.0])
def test_an_answer_is_that_of_generate(client, service, tiny, budget):
    answer = ask(client, COLOURS[0], budget=budget)
    assert answer.choices[0].message.content == by_generate(service, tiny, COLOURS[0], budget)
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.plan["budget"] == budget
    assert usage.cost["flops"]["fraction"] <= budget + 0.05
    assert (usage.cost["flops"]["fraction"] == 1) == (budget == 1)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny-llava"]


def test_a_stream_gives_the_same_text_and_usage(client):
    whole = ask(client, COLOURS[1], budget=0.6)
    with client.chat.completions.create(
        model="tiny-llava", messages=messages(COLOURS[1]), max_tokens=8, stream=True,
        stream_options={"include_usage": True}, extra_body={"budget": 0.6},
    ) as stream:  # fmt: skip
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage


def test_several_images_and_none(client):
    one, two, none = (ask(client, *COLOURS[:n]).usage.prompt_tokens for n in (1, 2, 0))
    assert two - one == one - none >= 49


def test_answers_of_mixed_plans_are_those_of_single_ones(client, service, tiny):
    """More at once than there is room for, of different plans, prompts and lengths."""
    asked = [
        (COLOURS[n % 3], (0.6, 1.0)[n % 2], " ".join(["how"] * (n % 5) + [QUESTION]), 1 + n % 9)
        for n in range(24)
    ]
    expected = [by_generate(service, tiny, c, b, t, n) for c, b, t, n in asked]

    def one(row):
        colour, budget, text, most = row
        return ask(client, colour, text=text, most=most, budget=budget)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, asked))
    assert [answer.choices[0].message.content for answer in answers] == expected
    assert [answer.usage.plan["budget"] for answer in answers] == [row[1] for row in asked]


def test_bad_requests_are_refused(client):
    for own, said in (
        ({"budget": 0.1}, "below 0.6"),
        ({"budget": 2}, "budget"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"deadline_ms": 0.001}, "deadline"),
        ({"max_completion_tokens": 10**6}, "room"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            ask(client, COLOURS[0], **own)
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="other", messages=messages())
    with pytest.raises(openai.BadRequestError, match="4 images"):
        ask(client, *COLOURS, COLOURS[0])


def test_keys_are_asked_for(client):
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="first-kez"))
    assert ask(client.with_options(api_key="first-key")).choices


def test_a_long_deadline_runs_the_whole_model_and_a_short_one_less(client, service):
    """Between what the two rungs are expected to take, the cheap one is picked."""
    assert ask(client, COLOURS[0], deadline_ms=60_000).usage.plan["budget"] == 1
    assert ask(client, COLOURS[0], headers={"x-llm-d-slo-ttft-ms": "60000"}).usage.plan["budget"]


def test_a_server_that_has_become_slow_finds_out_that_it_is_fast_again(client, service):
    """Whoever does nothing is asked, however late it expects to be."""
    governor = service.engine._governor
    for passes in (governor.prompts, governor.tokens):
        for _ in range(3):
            passes.learn(1.0, 1e6)
    budgets = [ask(client, COLOURS[0], deadline_ms=60_000).usage.plan["budget"] for _ in range(12)]
    assert budgets[0] == 0.6
    assert budgets[-1] == 1


def test_a_question_picks_the_patches_that_are_about_it(guided, tiny):
    """Requests together, with one picture, several and none; each is asked by its own text."""
    client, service, model = guided
    processor, (rung,) = tiny[1], service.engine.ladder.rungs
    questions, expected = ("what is red", "blue circle left"), []
    for text in questions:
        spoken = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(spoken, add_generation_prompt=True, tokenize=False)
        picture = Image.new("RGB", (56, 56), COLOURS[0])
        inputs = processor(text=prompt, images=picture, return_tensors="pt")
        with torch.no_grad(), planner.budget(model, rung.plan), planner.question(text):
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(new, skip_special_tokens=True))
    asked = [(questions[0], 1), (questions[1], 1), (questions[0], 2), ("what", 0)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda a: ask(client, *COLOURS[: a[1]], text=a[0]), asked))
    assert [answer.choices[0].message.content for answer in answers[:2]] == expected
    kept = [answer.usage.plan["image_tokens"] for answer in answers]
    assert kept == [{"0": 9}, {"0": 9}, {"0": 18}, {}]
