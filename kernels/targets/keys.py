"""What is known of a launch, and the key that a generated kernel is found by.

Facts are constants, types, which optional tensors are absent, what survivors hold: the same whether
a launch is recorded or about to run. What the input decides (rows, tokens, strides of activations)
is no fact, so that a generated kernel runs at any length; nor are floating-point numbers, such as
the scale of scores, which a Graph does not tell. Computing a key reads nothing off a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from torch import Tensor

from planner.ir.intervals import Intervals
from planner.kernels.survivors import Survivors
from planner.kernels.triton.launch import Launch

# Parameters of kernels, and fields of `Survivors`.
SURVIVORS = ("units", "counts", "lanes")
Fact = str | int | None
Key = tuple[str, tuple[tuple[str, Fact], ...]]


def facts_of(launch: Launch, any_plan: bool) -> dict[str, Fact]:
    """Facts by parameter, in the order of the kernel's parameters.

    `any_plan` leaves out what a plan decides, survivors and their number.
    """
    kernel, survivors = launch.kernel, launch.survivors
    known = None if any_plan or survivors is None else survivors.kept_runs
    constant = kernel.constants | kernel.of_model | (frozenset() if any_plan else kernel.of_plan)
    facts: dict[str, Fact] = {}
    for parameter in kernel.function.arg_names:
        value = launch.arguments[parameter]
        if isinstance(value, Tensor):
            fact = str(value.dtype).removeprefix("torch.")
            if parameter in SURVIVORS and survivors is not None and known is not None:
                fact += _text(known, survivors.width)
            facts[parameter] = fact
        elif parameter in constant or value is None:
            facts[parameter] = value
    return facts


def key_of(launch: Launch, any_plan: bool) -> Key:
    """The name of the kernel, and the facts."""
    return launch.kernel.name, tuple(facts_of(launch, any_plan).items())


def contents_of(launch: Launch) -> dict[str, list[int]]:
    """What the index tensors of one plan's survivors hold, by parameter, if the host knows it."""
    survivors = launch.survivors
    if survivors is None or survivors.kept_runs is None or survivors.plans > 1:
        return {}
    contents = _contents(survivors.kept_runs[0], survivors.width)
    return {n: contents[n] for n in SURVIVORS if launch.arguments.get(n) is not None}


@lru_cache(maxsize=4096)
def _text(kept_runs: tuple[Intervals, ...], width: int) -> str:
    """Surviving lanes of each plan: `` of 0-15,24-39 by 8``."""
    plans = [",".join(f"{a}-{b - 1}" for a, b in runs) or "none" for runs in kept_runs]
    return f" of {'; '.join(plans)} by {width}"


@lru_cache(maxsize=1024)
def _contents(runs: Intervals, width: int) -> Mapping[str, list[int]]:
    """Entries of the tensors of one plan's survivors, as far as they are meant."""
    made = Survivors.packed(runs, width)
    lanes = [] if made.lanes is None else made.lanes[0].tolist()
    return {"units": made.units[0].tolist(), "counts": made.counts.tolist(), "lanes": lanes}
