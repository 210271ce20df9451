"""One launch of a plan as one readable file: its kernel, specialised to what is known.

Enters: launches recorded on meta tensors (`planner.kernels.targets.plan_launches`). Leaves:
`Source`s, text and what is needed to compile and to find it. A file stands alone: it needs Triton,
and nothing of planner. Launches with equal keys share one.

A source of one plan holds its survivors, as arithmetic where they come in few pieces. An
index-driven source is given them as tensors like the kernel it comes from, and serves any plan.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.runtime.jit import JITFunction

from planner.ir.intervals import print_ranges
from planner.kernels.targets.keys import Key, contents_of, facts_of, key_of
from planner.kernels.targets.plan_launches import Call
from planner.kernels.targets.specialise import Program
from planner.kernels.targets.tables import Table
from planner.kernels.triton.launch import Launch
from planner.kernels.triton.tiles import Target

__all__ = [
    "Origin",
    "Source",
    "layers_of",
    "load_function",
    "modules_of",
    "phases_of",
    "sources_of",
]

# An index of more pieces than that is read from memory, not computed.
_PIECES = 16


@dataclass(frozen=True)
class Origin:
    """What the head of every file says.

    Attributes:
        model: what the user called it.
        plan: digest of the plan.
        version: of planner.
    """

    model: str
    plan: str
    version: str


@dataclass(frozen=True)
class Source:
    """One generated file.

    Attributes:
        name: of the file, without ``.py``.
        text: Python source.
        function: name of the kernel in it.
        parameters: that the kernel still has, in order.
        launch: as recorded, the first of those that share the source.
        calls: the ops that make such launches, in order.
        stages: of the software pipeline.
    """

    name: str
    text: str
    function: str
    parameters: tuple[str, ...]
    launch: Launch
    calls: tuple[Call, ...]
    stages: int

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the launch that the kernel still takes."""
        return {name: self.launch.arguments[name] for name in self.parameters}


def layers_of(calls: Iterable[Call]) -> str:
    """Decoder layers of some ops, as ranges."""
    return print_ranges(sorted({call.layer for call in calls}))


def modules_of(calls: Iterable[Call]) -> str:
    """Modules of a layer that some ops belong to: ``q_proj, k_proj``."""
    return ", ".join(dict.fromkeys(call.module for call in calls))


def phases_of(calls: Iterable[Call]) -> str:
    """Phases that some ops run in: ``prefill, decode``."""
    return ", ".join(dict.fromkeys(call.phase for call in calls))


def sources_of(
    launches: Iterable[tuple[Call, Launch]], target: Target, origin: Origin, *, any_plan: bool
) -> list[Source]:
    """A source for every launch of a plan; launches with equal keys share one.

    Args:
        launches: and the ops that make them, from `plan_launches.launches_of`.
        target: that they were recorded for.
        origin: for the head of the files.
        any_plan: survivors as tensors, for plans that change with the input.
    """
    shared: dict[Key, list[tuple[Call, Launch]]] = {}
    for call, launch in launches:
        shared.setdefault(key_of(launch, any_plan), []).append((call, launch))
    sources: dict[str, Source] = {}
    for uses in shared.values():
        (_, launch), calls = uses[0], [call for call, _ in uses]
        names = (f"{launch.kernel.name}_{number}" for number in range(1, len(shared) + 1))
        name = next(name for name in names if name not in sources)
        sources[name] = _source(name, launch, calls, target, origin, any_plan)
    return list(sources.values())


def load_function(path: Path, name: str) -> JITFunction:
    """A kernel of a generated file. The file must stay: Triton reads the text of its functions."""
    spec = importlib.util.spec_from_file_location(f"planner_generated_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: JITFunction = getattr(module, name)
    return function


def _source(
    name: str,
    launch: Launch,
    calls: Sequence[Call],
    target: Target,
    origin: Origin,
    any_plan: bool,
) -> Source:
    kernel, survivors = launch.kernel, launch.survivors
    known: dict[str, Any] = {
        parameter: fact
        for parameter, fact in facts_of(launch, any_plan).items()
        if fact is launch.arguments[parameter]
    }
    tables = {} if any_plan else _tables(launch)
    one_plan = not any_plan and survivors is not None and survivors.plans == 1
    program = Program()
    made = program.add(
        kernel.function,
        known | tables,
        kernel.plan_axis if one_plan else None,
        kernel.of_plan,
    )
    # A computed index takes no step of the pipeline any more.
    stages = (launch.stages + 1) // 2 if kernel.indexed_by in tables else launch.stages
    text = f"{_head(launch, calls, target, origin, any_plan)}\n\n{program.source}"
    return Source(name, text, made.name, made.parameters, launch, tuple(calls), stages)


def _tables(launch: Launch) -> dict[str, Table]:
    """Index tensors of few enough pieces."""
    found = {}
    for parameter, entries in contents_of(launch).items():
        singular = parameter.removesuffix("s")
        held = print_ranges(entries) if parameter == "units" else "bit j is set if lane j survives"
        table = Table.of(f"{singular}_at", f"`{parameter}` at an index: {held}.", entries)
        if len(table.pieces) <= _PIECES:
            found[parameter] = table
    return found


def _head(
    launch: Launch, calls: Sequence[Call], target: Target, origin: Origin, any_plan: bool
) -> str:
    """The file's docstring and imports."""
    call = calls[0]
    plan = "any plan" if any_plan else f"plan {origin.plan}"
    length = f"{call.tokens} token{'s' * (call.tokens > 1)}"
    return f'''"""{launch.kernel.name}: {phases_of(calls)}, sm_{target.capability}.

Model {origin.model}, {plan}: {modules_of(calls)}, layers {layers_of(calls)}.
Tiled for batch {call.batch}, {length}; other numbers of these run too.
Written by planner {origin.version}: compile again, do not edit.
"""

import triton
import triton.language as tl
'''
