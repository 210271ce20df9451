import json

import pytest

from planner.cli.debug import LEVELS, debug_level
from planner.ir.errors import InputError

# What a level adds to stderr: the beginning of a line that only it and those above it print.
MARKS = {
    1: "stage lower:",
    2: "problem: ",
    3: "token option 0: keep ",
    4: "-- specialise",
    5: "operator lm_head: linear, ",
}


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_each_level_adds_its_part(cli, monkeypatch, level):
    monkeypatch.setenv("PLANNER_DEBUG", str(level))
    code, out, err = cli("compile", "--model", "tiny-llava", "--json")
    assert code == 0
    json.loads(out)
    lines = err.splitlines()
    for known, mark in MARKS.items():
        assert any(line.startswith(mark) for line in lines) == (known <= level), mark


def test_levels_agree_with_the_plan(cli, cli_json, monkeypatch):
    monkeypatch.setenv("PLANNER_DEBUG", "5")
    _, out, err = cli("compile", "--model", "tiny-llava", "--budget", "0.5", "--json")
    document = json.loads(out)
    kept = [line.split(": ")[1].split(" ") for line in err.splitlines() if " kept, utility" in line]
    counts = [document["kept"][kind] for kind in ("heads", "mlp")]
    assert sum(int(words[0]) for words in kept) == sum(count["kept"] for count in counts)
    assert sum(int(words[2]) for words in kept) == sum(count["of"] for count in counts)
    chosen = [line for line in err.splitlines() if line.endswith(", chosen")]
    assert [f"keep {document['kept']['tokens']['kept']}," in line for line in chosen] == [True]
    operators = [line for line in err.splitlines() if line.startswith("operator ")]
    flops = sum(int(line.split(", ")[1].removesuffix(" FLOP")) for line in operators)
    inspected = cli_json("inspect", "--model", "tiny-llava", "--plan", document["plan"])
    assert flops == inspected["totals"]["flops"]


@pytest.mark.parametrize("text", ["verbose", "-1", "6", "1.5", "²"])
def test_other_levels_are_refused(cli, monkeypatch, text):
    monkeypatch.setenv("PLANNER_DEBUG", text)
    with pytest.raises(InputError, match="number from 0 to 5"):
        debug_level()
    code, _, err = cli("compile", "--model", "tiny-llava")
    assert code == 2
    assert err.count("\n") == 1


def test_an_empty_level_is_none(monkeypatch):
    monkeypatch.setenv("PLANNER_DEBUG", "")
    assert debug_level() == 0
