"""Caches of several answers joined, decoded together and taken apart again."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import dense_plan, plans
from transformers import DynamicCache

from planner.models.running.joined_cache import CachedAnswer, can_be_joined, join
from planner.models.running.kv_cache import cache_argument
from planner.models.running.session import Setting
from planner.models.running.skipping import session_on


@pytest.fixture(params=["llava", "llava_onevision", "qwen3"])
def family(request, lowered_family):
    return lowered_family(request.param)


@torch.no_grad()
def step(family, cache, tokens, lengths, total):
    """Logits of one more token for each answer."""
    lengths = torch.tensor(lengths)[:, None]
    mask = (torch.arange(total + 1) >= total - lengths).long()
    return family.model(
        input_ids=torch.tensor(tokens)[:, None], attention_mask=mask, position_ids=lengths,
        use_cache=True, **{cache_argument(family.model.forward): cache},
    ).logits[:, -1]  # fmt: skip


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_answers_joined_decode_as_alone(family, data):
    """Under random plans, dense ones among them, of other lengths, with one that leaves."""
    family, graph = family
    assert can_be_joined(family.model)
    session = session_on(family.model, graph)
    image_tokens = family.image_tokens
    chosen = [data.draw(plans(graph, image_tokens)) for _ in range(2)] + [dense_plan(graph)]
    prompts = [family.inputs(1, seed=n, before=(2 + 3 * n,)) for n in range(3)]
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    argument = cache_argument(family.model.forward)

    def read():
        answers = []
        for plan, prompt, length in zip(chosen, prompts, lengths):
            cache = DynamicCache()
            with torch.no_grad(), session.under(plan):
                family.model(**prompt, **{argument: cache}, use_cache=True)
            answers.append(CachedAnswer(cache, 0, length))
        return answers

    tokens = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    alone = {}
    for number, answer in enumerate(read()):
        for turn, token in enumerate(tokens[number]):
            length = lengths[number] + turn
            with session.under(chosen[number]):
                alone[number, turn] = step(family, answer.cache, [token], [length], length)[0]
    answers, running = dict(enumerate(read())), [2, 0, 1]
    for turn in range(3):
        if turn == 2:
            running = data.draw(st.sampled_from([[0, 1], [2], [1, 2], [1]]))
        cache = join([answers[n] for n in running], session.program_of(
            Setting(tuple(chosen[n] for n in running))))  # fmt: skip
        now = [lengths[n] + turn for n in running]
        with session.under([chosen[n] for n in running]):
            logits = step(family, cache, [tokens[n][turn] for n in running], now, max(now))
        for row, number in enumerate(running):
            torch.testing.assert_close(
                logits[row], alone[number, turn], rtol=1e-4, atol=1e-4, msg=f"{number} {turn}"
            )
            answers[number] = CachedAnswer(cache, row, now[row] + 1)
