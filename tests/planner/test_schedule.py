"""Schedule files: read back as written, and refused in one sentence."""

import pytest

from planner.ir.errors import InputError
from planner.schedule import Schedule, is_schedule, load_schedule, save_schedule

SCHEDULE = Schedule("m", "f00", "/s", "adallava-l", "flops=0.65", 4, 16, "fastv:k=2", {})


def test_a_schedule_comes_back(tmp_path):
    path = tmp_path / "schedule.yaml"
    save_schedule(SCHEDULE, path)
    assert load_schedule(path) == SCHEDULE
    assert is_schedule(path)


def test_a_plan_is_no_schedule(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("planner_plan: 1\n")
    assert not is_schedule(path)
    assert not is_schedule(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("schedule: 2", "schedule: 7"), "has format 7"),
        (lambda text: text.replace("limit: 4", "limit: many"), "broken at limit"),
        (lambda text: text.replace("schedule: 2", "schedule: 1"), "has format 1"),
        (lambda text: text.replace("limit: 4", "limit: 5"), "was changed after it was written"),
        (lambda text: text.replace("limit: 4", "limit: 4.0"), "was changed after it was written"),
        (lambda text: text.replace("of: 16", "of: 0"), "was changed after it was written"),
        (lambda text: text.partition("digest")[0], "was changed after it was written"),
        (lambda text: text + "colour: red\n", "broken at colour"),
        (lambda text: text.replace("limit: 4\n", ""), "broken at limit"),
        (lambda text: "- 1\n", "not a schedule"),
        (lambda text: "a: [", "truncated or not YAML"),
        (None, "there is no schedule"),
    ],
)
def test_a_broken_schedule_is_one_sentence(tmp_path, change, message):
    path = tmp_path / "schedule.yaml"
    if change is not None:
        save_schedule(SCHEDULE, path)
        path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=message) as caught:
        load_schedule(path)
    assert "\n" not in str(caught.value)
