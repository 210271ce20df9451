"""Tokens that are drawn: by equal seeds the same, whatever else goes wrong."""

import openai
import pytest
import torch
from chats import COLOURS, ask, messages

from planner.ir.errors import PlannerError
from planner.serving.chat_format import Message
from planner.serving.running_batch import Sampler


class Failing(Sampler):
    """Of a request whose logits cannot be drawn from."""

    def distribution(self, logits):
        raise PlannerError("this one")


def draws(sampler, logits, count=8):
    return [sampler.draw(sampler.distribution(logits)) for _ in range(count)]


def test_a_prompt_that_fails_leaves_the_seeds_of_others_as_they_were(service):
    """They are read again, and have to draw as if they had been alone."""
    engine = service.engine
    batch, rung = engine._batch, engine.ladder.rungs[-1]
    prompt = service._reader.read([Message(**each) for each in messages(COLOURS[0])])
    logits = torch.zeros(1, 50)
    seeded = Sampler(1.5, seed=7)
    with pytest.raises(PlannerError, match="this one"):
        batch.read([prompt.inputs] * 2, [rung] * 2, [seeded, Failing(0.0)], [prompt.asked] * 2)
    assert not batch.answers
    assert draws(seeded, logits) == draws(Sampler(1.5, seed=7), logits)


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-10, 1e-5])
def test_the_lowest_temperatures_pick_the_likeliest_token(client, temperature):
    expected = ask(client, COLOURS[0]).choices[0].message.content
    answer = ask(client, COLOURS[0], temperature=temperature, seed=1)
    assert answer.choices[0].message.content == expected


@pytest.mark.parametrize("temperature", [1e-320, 1e-5, 1.0, 2.0, 1e30])
@pytest.mark.parametrize("top_p", [1e-320, 1e-9, 0.5, 1.0])
def test_any_temperature_gives_a_distribution(temperature, top_p):
    for logits in ([0.0, 3e38, -3e38], [-3e38, -2e38, -1e38], [5.0, float("-inf"), 4.0]):
        found = Sampler(temperature, top_p, 1).distribution(torch.tensor([logits]))
        assert float(found.sum()) == pytest.approx(1)
        assert 0 <= draws(Sampler(temperature, top_p, 1), torch.tensor([logits]), 1)[0] < 3
        if temperature < 1e-4 or top_p < 1e-4:
            assert int(found.argmax()) == int(torch.tensor(logits).argmax())
            assert float(found.max()) == 1


def test_temperatures_out_of_range_are_refused(client):
    for temperature in (-1e-320, 2.5):
        with pytest.raises(openai.BadRequestError, match="temperature"):
            ask(client, COLOURS[0], temperature=temperature)
