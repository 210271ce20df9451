"""Operators at many sizes, then whole passes; how far predictions are off."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

from planner.ir.cost.measured_device import MeasuredDevice, Measurement
from planner.kernels.ops.kept_linear import SMALL
from planner.kernels.ops.product_probe import CLEARLY, KINDS_FROM, cpu_name, keep
from planner.models.profiling.operator_cases import Bench, Case
from planner.models.profiling.sweep import sweep, table_of
from planner.models.profiling.whole_passes import Subject, fitted, timed
from planner.progress import Progress

# Width and layers of the models whose passes are timed, and whether they see.
_SUBJECTS = ((256, 4, False), (1024, 3, False), (512, 4, True))
_MOST_TOKENS = 600
_FITTED, _CHECKED = 60, 30


def profile(
    name: str,
    bench: Bench,
    rounds: int,
    partial: Path,
    bar: Callable[[str], AbstractContextManager[Progress]],
) -> MeasuredDevice:
    """Measure a device with numbers of one precision.

    Args:
        bench: where, and of which precision.
        rounds: how often each operator is timed.
        partial: file that keeps what was timed, from which a run that was cut short goes on.
    """
    machine = machine_of(bench.place)
    facts = [machine, str(bench.dtype)]
    precision = str(bench.dtype).removeprefix("torch.")
    cases, held_out = bench.cases(), bench.held_out()
    with bar("operators") as progress:
        seconds = sweep(bench, [*cases, *held_out], rounds, partial, facts, progress)
    by_table: dict[tuple[str, str], dict[tuple[int, ...], float]] = {}
    for case in cases:
        by_table.setdefault((case.table, case.backend), {})[case.sizes] = seconds[case.key]
    tables = {
        f"{table}.{backend}".rstrip("."): table_of(table, found)
        for (table, backend), found in by_table.items()
    }
    chosen = _chosen(bench, cases, seconds)
    tables["product"] = table_of(
        "product", {c.sizes: seconds[c.key] for c in cases if c.backend == chosen(c) != ""}
    )
    checked = [case for case in held_out if case.backend == chosen(case)]
    off = [tables[case.table].at(*case.sizes) / seconds[case.key] - 1 for case in checked]
    operations, moved = _peaks(bench, cases, seconds)
    device = MeasuredDevice(
        name,
        operations / 1e12,
        moved / 1e9,
        _memory_bytes(bench) / 1e9,
        f"planner calibrate on {machine['processor']}",
        machine,
        {precision: Measurement(tables)},
    )
    subjects = [Subject.of(bench, *which) for which in _SUBJECTS]
    with bar("passes") as progress:
        passes = timed(subjects, _FITTED + _CHECKED, _MOST_TOKENS, 0, progress)
    device = fitted(device, passes[:_FITTED])
    errors = {
        "operators": quantiles(off),
        "passes": quantiles(off := [one.error(device) for one in passes[_FITTED:]])
        | {"late": round(max(0.0, *(1 / (1 + error) - 1 for error in off)), 4)},
    }
    known = replace(device.measured[precision], errors=errors)
    return replace(device, measured={precision: known})


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


def quantiles(errors: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 95th percentile of their size."""
    sizes = np.abs(errors)
    at = {"median": 0.5, "p90": 0.9, "p95": 0.95}
    return {name: round(float(np.quantile(sizes, share)), 4) for name, share in at.items()}


def _chosen(
    bench: Bench, cases: Sequence[Case], seconds: Mapping[str, float]
) -> Callable[[Case], str]:
    """Which backend a case of a product runs by under a plan; "" for other cases.

    Where oneDNN is an alternative to MKL, what multiplies fastest is settled for this machine.
    """
    first, *others = bench.backends
    if not others:
        return lambda case: first if case.table == "product" else ""
    faster = []
    for low, high in zip(KINDS_FROM, [*KINDS_FROM[1:], 10**9], strict=True):
        ratios = [
            seconds[case.key] / seconds[replace(case, backend="mkl").key]
            for case in cases
            if case.backend == "onednn" and low <= case.sizes[0] < high and _is_large(case)
        ]
        faster.append(bool(np.exp(np.mean(np.log(ratios))) < CLEARLY))
    keep(torch.get_num_threads(), tuple(faster))

    def chosen(case: Case) -> str:
        if case.table != "product":
            return ""
        kind = sum(case.sizes[0] >= low for low in KINDS_FROM) - 1
        return "onednn" if faster[kind] and _is_large(case) else "mkl"

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
    read = (c.sizes[1] * c.sizes[2] * bench.dtype.itemsize / seconds[c.key] for c in products)
    return operations, max(read)


def _memory_bytes(bench: Bench) -> float:
    if bench.place.type == "cuda":
        return float(torch.cuda.get_device_properties(bench.place).total_memory)
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
