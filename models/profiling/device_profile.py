"""Operators at many sizes, then whole passes; how far predictions are off."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers

from planner.cpu import cpu_name
from planner.ir.cost.measured_device import (
    PRECISIONS,
    MeasuredDevice,
    Measurement,
    Table,
    from_memory,
)
from planner.kernels.ops.kept_linear import SMALL
from planner.kernels.ops.product_probe import CLEARLY, KINDS_FROM, keep
from planner.models.profiling.operator_cases import AXES, Bench, Case
from planner.models.profiling.subjects import Subject
from planner.models.profiling.sweep import Partial, sweep, table_of
from planner.models.profiling.whole_passes import fitted, quantiles, repeats_differ, timed
from planner.progress import Progress

# Width and layers of the models whose passes are timed, and whether they see.
_SUBJECTS = ((256, 4, False), (512, 4, True), (1024, 3, False), (2048, 2, False))
_MOST_TOKENS = 600
# Passes of them, and of a model that is measured by itself.
_PASSES, _OF_MODEL = 80, 72


def profile(
    name: str,
    bench: Bench,
    rounds: int,
    path: Path,
    bar: Callable[[str], AbstractContextManager[Progress]],
) -> MeasuredDevice:
    """Measure a device with numbers of one precision.

    Args:
        bench: where, and of which precision.
        rounds: how often each operator is timed.
        path: of the file that keeps what was timed, from which a run that was cut short goes on.
    """
    machine = machine_of(bench.place)
    precision = str(bench.dtype).removeprefix("torch.")
    partial = Partial.at(path, [machine, precision, AXES])
    compared = bench.compared()
    with bar("backends") as progress:
        chosen = _chosen(bench, compared, sweep(bench, compared, rounds, partial, progress))
    cases, held_out = (
        [replace(case, backend=chosen(case)) for case in some]
        for some in (bench.cases(), bench.held_out())
    )
    with bar("operators") as progress:
        seconds = sweep(bench, [*cases, *held_out], rounds, partial, progress)
    operations, moved = _peaks(bench, cases, seconds)
    known = Measurement(_tables(cases, seconds), pace=partial.pace)
    device = MeasuredDevice(
        name,
        operations / 1e12,
        moved / 1e9,
        _memory_bytes(bench) / 1e9,
        f"planner calibrate on {machine['processor']}",
        machine,
        {precision: known},
    )
    off = [_alone(known.tables, case) / seconds[case.key] - 1 for case in held_out]
    subjects = [Subject.made(bench, *which) for which in _SUBJECTS]
    with bar("passes") as progress:
        passes = timed(subjects, _PASSES, _MOST_TOKENS, 0, partial, progress, known.pace)
    known = replace(known, errors=quantiles(off), passes=fitted(device, passes))
    return replace(device, measured={precision: known})


def profile_model(
    device: MeasuredDevice,
    subject: Subject,
    most_tokens: int,
    path: Path,
    bar: Callable[[str], AbstractContextManager[Progress]],
) -> tuple[MeasuredDevice, float]:
    """Measure passes of one model on a device that was measured, for prompts of so many tokens at
    most besides those of a picture.

    Returns:
        The device, and the share by which two measurements of a pass differ.
    """
    graph, bench = subject.graph, subject.bench
    model, known = str(graph.properties["fingerprint"]), device.at(graph.dtype_bytes)
    partial = Partial.at(path, [machine_of(bench.place), str(bench.dtype), model, most_tokens])
    with bar("passes") as progress:
        passes = timed([subject], _OF_MODEL, most_tokens, 1, partial, progress, known.pace)
    found = fitted(device, passes, known.passes)
    known = replace(known, models={**known.models, model: found})
    precision = PRECISIONS[graph.dtype_bytes]
    measured = {**device.measured, precision: known}
    return replace(device, measured=measured), repeats_differ(passes)


def _tables(cases: Sequence[Case], seconds: Mapping[str, float]) -> dict[str, Table]:
    by_table: dict[str, dict[tuple[int, ...], float]] = {}
    for case in cases:
        if case.table != "weights":
            by_table.setdefault(case.table, {})[case.sizes] = seconds[case.key]
    rows = dict.fromkeys(case.sizes[:1] for case in cases if case.table == "weights")
    by_table["weights"] = {
        some: max(
            1e-9,  # where both take as long, what they differ by is noise
            median(
                seconds[case.key] * 1e6 / math.prod(case.sizes[1:])
                for case in cases
                if case.table == "weights" and case.sizes[:1] == some
            ),
        )
        for some in rows
    }
    return {name: table_of(name, found) for name, found in by_table.items()}


def _alone(tables: Mapping[str, Table], case: Case) -> float:
    """Predicted seconds of a case."""
    if case.table != "cold":
        return tables[case.table].at(*case.sizes)
    return tables["product"].at(*case.sizes) + from_memory(tables, *case.sizes)


def machine_of(place: torch.device) -> dict[str, str | int]:
    """What measurements depend on."""
    cuda = place.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name() if cuda else cpu_name(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": str(torch.version.cuda) if cuda else "",
        "capability": "" if cuda else torch.backends.cpu.get_cpu_capability(),
    }


def _chosen(
    bench: Bench, compared: Sequence[Case], seconds: Mapping[str, float]
) -> Callable[[Case], str]:
    """Which backend a case of a product runs by under a plan; "" for other cases.

    Where there is another way than `F.linear`, what is faster is settled for this machine.
    """
    usual, *others = bench.backends
    faster = [False] * len(KINDS_FROM)
    for kind, (low, high) in enumerate(zip(KINDS_FROM, [*KINDS_FROM[1:], 10**9], strict=True)):
        ratios = [
            seconds[case.key] / seconds[replace(case, backend=usual).key]
            for case in compared
            if case.backend in others and low <= case.sizes[0] < high and _is_large(case)
        ]
        faster[kind] = bool(ratios) and bool(np.exp(np.mean(np.log(ratios))) < CLEARLY)
    if compared:
        keep(torch.get_num_threads(), bench.dtype, tuple(faster))

    def chosen(case: Case) -> str:
        if not case.is_product:
            return ""
        kind = sum(case.sizes[0] >= low for low in KINDS_FROM) - 1
        return others[0] if faster[kind] and _is_large(case) else usual

    return chosen


def _is_large(case: Case) -> bool:
    _, features, out = case.sizes
    return features * out >= SMALL


def _peaks(
    bench: Bench, cases: Sequence[Case], seconds: Mapping[str, float]
) -> tuple[float, float]:
    """The most operations and bytes a second that were seen."""
    products = [case for case in cases if case.table == "product"]
    operations = max(case.operations / seconds[case.key] for case in products)
    moved = [
        math.prod(case.sizes[1:])
        * bench.dtype.itemsize
        / (seconds[case.of("product").key] + max(0.0, seconds[case.key]))
        for case in cases
        if case.table == "weights"
    ]
    return operations, max(moved)


def _memory_bytes(bench: Bench) -> float:
    if bench.place.type == "cuda":
        return float(torch.cuda.get_device_properties(bench.place).total_memory)
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
