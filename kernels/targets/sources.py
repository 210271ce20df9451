"""One launch of a plan as one readable file: its kernel, specialised to what is known.

A file stands alone: it needs Triton, and nothing of planner. A source of one plan holds its
survivors, as arithmetic where they come in few pieces. An index-driven source is given them as
tensors like the kernel it comes from, and serves any plan.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.runtime.jit import JITFunction

from planner import __version__
from planner.ir.intervals import print_ranges
from planner.kernels.targets.keys import Key, contents_of, facts_of, key_of
from planner.kernels.targets.partial_evaluation import Program
from planner.kernels.targets.plan_launches import Call
from planner.kernels.targets.tables import Table
from planner.kernels.triton.launch import Launch

# An index of more pieces than that is read from memory, not computed.
_PIECES = 16


@dataclass(frozen=True)
class Source:
    """One generated file."""

    name: str  # of the file, without ``.py``
    body: str  # its functions, the kernel named `function` behind those that it calls
    function: str
    arguments: dict[str, Any]  # of the launch that the kernel still takes
    stages: int  # of the software pipeline
    launch: Launch  # as recorded, the first of those that share the source
    calls: tuple[Call, ...]  # the ops that make such launches, in order

    @property
    def modules(self) -> str:
        """Modules of a layer that run it: ``self_attn.k_proj, self_attn.v_proj``."""
        return ", ".join(dict.fromkeys(call.module for call in self.calls))

    @property
    def phases(self) -> str:
        """In which it runs: ``prefill``, ``decode``, or both."""
        return ", ".join(dict.fromkeys(call.phase for call in self.calls))

    @property
    def layers(self) -> str:
        """Decoder layers that run it, as ranges."""
        return print_ranges(sorted({call.layer for call in self.calls}))

    def text(self, target: str, origin: str) -> str:
        """The file; `origin` is model and plan, for the head."""
        call = self.calls[0]
        length = f"{call.tokens} token{'s' * (call.tokens > 1)}"
        return f'''"""{self.launch.kernel.name}: {self.phases}, {target}.

{origin}: {self.modules}, layers {self.layers}.
Tiled for batch {call.batch}, {length}; other numbers of these run too.
Written by planner {__version__}: compile again, do not edit.
"""

import triton
import triton.language as tl


{self.body}'''


def sources_of(launches: Iterable[tuple[Call, Launch]], *, any_plan: bool) -> list[Source]:
    """A source for every launch of a plan; launches with equal keys share one.

    With `any_plan` survivors are tensors, for plans that change with the input.
    """
    shared: dict[Key, list[tuple[Call, Launch]]] = {}
    for call, launch in launches:
        shared.setdefault(key_of(launch, any_plan), []).append((call, launch))
    made: Counter[str] = Counter()
    sources = []
    for uses in shared.values():
        calls, (_, launch) = tuple(call for call, _ in uses), uses[0]
        made[launch.kernel.name] += 1
        name = f"{launch.kernel.name}_{made[launch.kernel.name]}"
        sources.append(_source(name, launch, calls, any_plan))
    return sources


def load_function(path: Path, name: str) -> JITFunction:
    """A kernel of a generated file. The file must stay: Triton reads the text of its functions."""
    spec = importlib.util.spec_from_file_location(f"planner_generated_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: JITFunction = getattr(module, name)
    return function


def _source(name: str, launch: Launch, calls: tuple[Call, ...], any_plan: bool) -> Source:
    kernel, survivors = launch.kernel, launch.survivors
    known: dict[str, Any] = {
        parameter: fact
        for parameter, fact in facts_of(launch, any_plan).items()
        if fact is launch.arguments[parameter]  # and not what is known of a tensor
    }
    tables = {} if any_plan else _tables(launch)
    one_plan = not any_plan and survivors is not None and survivors.plans == 1
    single = kernel.plan_axis if one_plan else None
    program = Program()
    made = program.add(kernel.function, known | tables, single, kernel.of_plan)
    # A computed index takes no step of the pipeline any more.
    stages = (launch.stages + 1) // 2 if kernel.indexed_by in tables else launch.stages
    arguments = {name: launch.arguments[name] for name in made.parameters}
    return Source(name, program.source, made.name, arguments, stages, launch, calls)


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
