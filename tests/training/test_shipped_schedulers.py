"""The schedulers that tiny-llava comes with: they load by name, keep to budgets, and answer."""

import pytest

from planner.ir.errors import InputError
from planner.models.scheduling.deciding import Deciding
from planner.models.scheduling.schedule_compiler import (
    compile_schedule,
    load_scheduled,
    scheduler_folder,
)
from planner.planning.request import Request
from planner.training.data import SceneQuestions
from planner.training.evaluate import UnderBudgets


@pytest.mark.parametrize(("name", "units"), [("adallava-l", 0), ("adallava-h", 3)])
def test_they_keep_to_a_budget_and_answer(name, units):
    schedule = compile_schedule(Request("tiny-llava", 0.6), name)
    assert (schedule.switches, schedule.limit) == (name, units)
    model, processor, scheduled = load_scheduled(schedule, mask=True)
    questions = SceneQuestions("test", 60, families=["existence", "attribute", "count"])
    deciding = Deciding(model, processor, scheduled.graph, scheduled)
    found = UnderBudgets(deciding, questions).measure(0.6)
    assert found["violations"] == 0
    assert found["cost_fraction"] == pytest.approx(schedule.cost["flops"]["fraction"], abs=2e-3)
    assert found["accuracy"] >= 0.85


def test_another_model_and_another_name_are_refused():
    with pytest.raises(InputError, match="was made for 'tiny-llava'"):
        compile_schedule(Request("llava-7b", 0.6), "adallava-l")
    with pytest.raises(InputError, match="no folder 'adallava-x'"):
        scheduler_folder("adallava-x")


def test_the_one_that_budgets_in_cost_uses_its_budget():
    """Of 0.65 a counting scheduler uses 0.625; here it is left to within one switch."""
    schedule = compile_schedule(Request("tiny-llava", 0.65, text_tokens=16), "adallava-cost")
    assert (schedule.switches, schedule.measure) == ("layers,heads,mlp:groups=16", "flops")
    assert 0.64 <= schedule.cost["flops"]["fraction"] <= 0.65
    model, processor, scheduled = load_scheduled(schedule, mask=True)
    questions = SceneQuestions("test", 60, families=["existence", "attribute", "count"])
    deciding = Deciding(model, processor, scheduled.graph, scheduled)
    found = UnderBudgets(deciding, questions).measure(0.65)
    assert found["violations"] == 0
    assert 0.99 * 0.65 <= found["cost_fraction"] <= 0.65
    assert found["utilisation"] >= 0.99
    assert found["plans"] > 20
    assert found["accuracy"] >= 0.85
