"""Whether oneDNN or MKL multiplies faster on this CPU, by the number of rows: measured, once.

Which of the two wins depends on the CPU, its libraries and the number of rows; vendors do not tell.
A fifth of a second of products answers it, and `planner calibrate` with more of them; the answer is
kept in the user's cache folder. So are those to other questions of this kind.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from planner.documents import digest_of, read_json
from planner.files import write_text
from planner.ir.errors import InputError
from planner.planning.graph_cache import cache_folder

# Products are of four kinds, by their rows: from so many on, and measured at so many.
KINDS_FROM = (1, 4, 24, 128)
MEASURED = (1, 8, 50, 274)
# Weights as plans narrow them: (out, in) features that are no round numbers.
_WEIGHTS = ((652, 1024), (1024, 644))
_ROUNDS = 9
# A library is only changed for what noise does not explain.
CLEARLY = 0.95


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by oneDNN, for a contiguous weight of float32 on an x86 CPU."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight, bias, "none", [], ""
    )
    return product


def onednn_is_faster(rows: int) -> bool:
    """Whether oneDNN multiplies so many rows, at least one, clearly faster than MKL here."""
    return fastest(torch.get_num_threads())[bisect_right(KINDS_FROM, rows) - 1]


@cache
def fastest(threads: int) -> tuple[bool, ...]:
    """For each kind of products, whether it is oneDNN, with so many threads."""
    return settled(path_of(threads), _onednn_is_faster)


def settled(path: Path, measure: Callable[[], tuple[bool, ...]]) -> tuple[bool, ...]:
    """What was measured, now or in another process."""
    with contextlib.suppress(InputError):
        found = read_json(path, "measured products") if path.is_file() else None
        if isinstance(found, list) and list(map(type, found)) == [bool] * len(KINDS_FROM):
            return tuple(found)
    # Modes that watch or change a thread's operators are not to see these.
    with ThreadPoolExecutor(1) as pool:
        faster = pool.submit(measure).result()
    _keep(path, faster)
    return faster


def keep(threads: int, faster: tuple[bool, ...]) -> None:
    """Have `fastest` say this from now on, in processes that start later as well."""
    _keep(path_of(threads), faster)
    fastest.cache_clear()


def _keep(path: Path, faster: tuple[bool, ...]) -> None:
    with contextlib.suppress(OSError, InputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(faster))


def path_of(threads: int, *question: object) -> Path:
    """Where the answer to a question is kept; without one, oneDNN's."""
    facts = [_cpu(), torch.__version__, threads, MEASURED, _WEIGHTS, *question]
    return cache_folder() / "products" / f"{digest_of(facts)[:32]}.json"


def cpu_name() -> str:
    """What people call this CPU."""
    named = [line for line in _cpu().splitlines() if line.startswith("model name")]
    return named[0].partition(":")[2].strip() if named else platform.processor()


def _cpu() -> str:
    """What tells one kind of CPU from another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        told = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
        return "\n".join(line for line in lines if line.split("\t")[0].strip() in told)
    return f"{platform.machine()} {platform.processor()}"


@torch.no_grad()
def _onednn_is_faster() -> tuple[bool, ...]:
    weights = [torch.randn(shape) for shape in _WEIGHTS]
    found = []
    for rows in MEASURED:
        times = [
            ratio(partial(by_onednn, x, weight, None), partial(F.linear, x, weight))
            for weight in weights
            for x in [torch.randn(rows, weight.shape[1])]
        ]
        found.append(math.prod(times) < CLEARLY ** len(times))
    return tuple(found)


def ratio(way: Callable[[], Tensor], usual: Callable[[], Tensor]) -> float:
    """Time of one way over the other: the least of interleaved rounds, as others may run too."""
    seconds = [math.inf, math.inf]
    for _ in range(_ROUNDS):
        for index, multiply in enumerate((way, usual)):
            begin = time.perf_counter()
            multiply()
            seconds[index] = min(seconds[index], time.perf_counter() - begin)
    return seconds[0] / seconds[1]
