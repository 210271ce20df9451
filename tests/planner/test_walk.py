"""The walk of docs/design.md from `planner compile` to `plan.yaml` is what happens, in order."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def walk():
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    section = text.partition("## The walk from `planner compile` to `plan.yaml`\n")[2]
    return re.findall(r"^\d+\. `([^`]+)`", section.partition("\n## ")[0], re.MULTILINE)


def entered(act):
    """The project's files in the order in which functions of theirs are first called."""
    order = {}

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and not code.co_name.startswith(("<", "__")):
            order.setdefault(os.path.realpath(code.co_filename))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(before)
    return [str(Path(p).relative_to(ROOT)) for p in order if Path(p).is_relative_to(ROOT)]


def test_the_walk_to_a_plan_is_what_happens(cli):
    files = walk()
    assert 10 < len(files) <= 16
    compile_ = ("compile", "--model", "tiny-llava", "-b", "0.65", "-q", "--utilities", "prior")
    assert cli(*compile_)[0] == 0
    met = entered(lambda: cli(*compile_))
    # Pricing asks planner.plan how a token stage scores, before there is a plan.
    assert set(files) <= set(met)
    met.remove("planner/plan.py")
    assert [path for path in files if path in met] == [path for path in met if path in files]
    # Of planning, only what other options ask for is off the walk.
    planning = [p for p in met if p.startswith("planner/planning/") and "/selectors/" not in p]
    assert set(planning) <= set(files)
