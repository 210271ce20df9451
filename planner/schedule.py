"""The Schedule: a budget and the scheduler that makes plans for it, input by input, at run time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from planner.documents import dump_yaml, read_yaml
from planner.files import write_text
from planner.ir.errors import InputError

FORMAT = 1


@dataclass(frozen=True)
class Schedule:
    """What `planner compile --scheduler` decides; the rest is decided per input.

    Attributes:
        model: what the user called the model.
        fingerprint: of the Graph it is for.
        scheduler: folder of the scheduler and of the checkpoint trained with it.
        switches: the scheduler's, such as ``adallava-l``.
        budget: one limit, such as ``flops=0.65``.
        limit: how much the budget allows to be switched on.
        of: how much there is to be switched on.
        measure: what both are in: ``switches``, or a metric, for the prompts that it was compiled
            for; other prompts are priced when they come.
        tokens: a token selector in front of the switches, "" for none.
        cost: of a prefill under any of its plans: ``{"flops": {"plan", "base", "fraction"}}``,
            language model only.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    model: str
    fingerprint: str
    scheduler: str
    switches: str
    budget: str
    limit: int
    of: int
    tokens: str = ""
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    measure: str = "switches"


_ADAPTER = TypeAdapter(Schedule)


def save_schedule(schedule: Schedule, path: Path) -> None:
    """Write a schedule file, whole or not at all."""
    document = {"planner_schedule": FORMAT, **asdict(schedule)}
    head = f"# A schedule of planner {FORMAT}: plans are made for every input.\n"
    write_text(path, head + dump_yaml(document))


def load_schedule(path: Path) -> Schedule:
    """Read and validate a schedule file; every fault is one sentence in an InputError."""
    document = read_yaml(path, "schedule")
    if not isinstance(document, dict) or "planner_schedule" not in document:
        raise InputError(f"'{path}' is not a schedule of planner")
    found = document.pop("planner_schedule")
    if found != FORMAT:
        raise InputError(f"the schedule '{path}' has format {found}, this planner reads {FORMAT}")
    try:
        return _ADAPTER.validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = first["msg"].lower()
        raise InputError(f"the schedule '{path}' is broken at {where}: {reason}") from None


def is_schedule(path: Path) -> bool:
    """Whether a file is a schedule, rather than a plan."""
    try:
        return (
            isinstance(document := read_yaml(path, "schedule"), dict)
            and "planner_schedule" in document
        )
    except InputError:
        return False
    return isinstance(document, dict) and "planner_schedule" in document
