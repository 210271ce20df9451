"""Models whose caches cannot be joined answer one request at a time."""

import pytest
import torch
from families import FAMILIES
from plans import plan_of

from planner.ir.lowering import lower_model
from planner.models.running.skipping import session_on
from planner.serving.ladder import Rung
from planner.serving.running_batch import RunningBatch, Sampler


# Positions that the model counts by itself; a sliding window.
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_an_answer_alone_is_that_of_generate(name):
    family = FAMILIES[name]()
    graph = lower_model(family.model, name)
    session = session_on(family.model, graph)
    plan, prompt = plan_of(graph, layers_off=(1,)), family.inputs(1)
    with session.under(plan), torch.no_grad():
        expected = family.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    batch = RunningBatch(family.model)
    assert not batch.can_join
    for _ in range(2):
        (answer,) = batch.read([prompt], [Rung(1.0, plan)], [Sampler(0.0)])
        for _ in range(3):
            batch.step()
        assert answer.failure is None
        assert answer.tokens == expected[0, prompt["input_ids"].shape[1] :].tolist()
        batch.drop(answer)
