"""The Schedule: a budget and the scheduler that makes plans for it, input by input, at run time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from planner.documents import check_signed, dump_yaml, of_format, read_yaml, signed, validated
from planner.files import write_text
from planner.ir.errors import InputError

FORMAT = 2
_KEY = "planner_schedule"


@dataclass(frozen=True)
class Schedule:
    """What `planner compile --scheduler` decides; the rest is decided per input."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    model: str  # what the user called the model
    fingerprint: str  # of the Graph it is for
    scheduler: str  # folder of the scheduler and of the checkpoint trained with it
    switches: str  # the scheduler's, such as ``adallava-l``
    budget: str  # one limit, such as ``flops=0.65``
    limit: int  # how much the budget allows to be switched on
    of: int  # how much there is to be switched on
    tokens: str = ""  # a token selector in front of the switches
    # Of a prefill under any of its plans: {"flops": {"plan", "base", "fraction"}}, language model
    # only.
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    # FLOPs that neither `cost` nor the budget counts: of the ``latency_token``, as one more token
    # of the prompt, and of the ``scheduler``, its encoder and its head.
    overhead: dict[str, float] = field(default_factory=dict)
    # The prefill as published tables count it; ``llm-viewer`` with the two tokens more that
    # AdaLLaVA's released code counts for the latency token.
    convention: str = "planner"
    published: dict[str, dict[str, float]] = field(default_factory=dict)
    # What `limit` and `of` are in: ``switches``, or a metric, for the prompts that it was compiled
    # for; other prompts are priced when they come.
    measure: str = "switches"
    device: str = ""  # that a budget in seconds is of


def save_schedule(schedule: Schedule, path: Path) -> None:
    """Write a schedule file, whole or not at all."""
    document = {_KEY: FORMAT, **asdict(schedule)}
    head = f"# A schedule of planner {FORMAT}: plans are made for every input.\n"
    write_text(path, head + dump_yaml(signed(document)))


def load_schedule(path: Path) -> Schedule:
    """Read and validate a schedule file; every fault is one sentence in an InputError."""
    document = read_yaml(path, "schedule")
    facts = of_format(document, _KEY, FORMAT, path, "schedule")
    facts.pop("digest", None)
    schedule = validated(Schedule, facts, f"the schedule '{path}'")
    check_signed(document, path, "schedule")
    return schedule


def is_schedule(path: Path) -> bool:
    """Whether a file is a schedule, rather than a plan."""
    try:
        document = read_yaml(path, "schedule")
    except InputError:
        return False
    return isinstance(document, dict) and _KEY in document
