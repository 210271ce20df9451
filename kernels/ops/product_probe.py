"""What multiplies faster on this CPU than `F.linear`, by the number of rows: measured, once.

Every precision has one other way. Whether it wins depends on the CPU, its libraries and the number
of rows; vendors do not tell. A fifth of a second of products answers it, and `planner calibrate`
with more of them; the answer is kept in the user's cache folder. So are those to other questions of
this kind.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from planner.cpu import cpu_kind
from planner.documents import digest_of, read_json
from planner.files import write_text
from planner.ir.errors import InputError
from planner.planning.graph_cache import cache_folder

# Products are of four kinds, by their rows: from so many on, and measured at so many.
KINDS_FROM = (1, 2, 24, 128)
MEASURED = (1, 8, 50, 274)
# Weights as plans narrow them: (out, in) features in groups of 64.
_WEIGHTS = ((704, 1024), (1024, 704))
# A comparison takes at least so many rounds, and so long: threads that wait for work of other kinds
# spin for a while before they sleep.
_ROUNDS, _SECONDS = 3, 0.03
# A library is only changed for what noise does not explain.
CLEARLY = 0.95


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by oneDNN, for a contiguous weight of float32 on an x86 CPU."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight, bias, "none", [], ""
    )
    return product


def turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` as the weight times the turned rows; of one row, a matrix times a vector.

    In bfloat16, libraries lay out anew what stands on the right before they multiply: here that are
    few rows rather than the whole weight.
    """
    rows = x.reshape(-1, x.shape[-1])
    product = weight @ rows[0] if len(rows) == 1 else (weight @ rows.t()).t().contiguous()
    product = product.view(*x.shape[:-1], len(weight))
    return product if bias is None else product + bias


# The other way of a precision.
OTHER_WAYS = {torch.float32: by_onednn, torch.bfloat16: turned}


def by_fastest(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of at least one row, or the other way where it is clearly faster here."""
    kind = bisect_right(KINDS_FROM, x.numel() // x.shape[-1]) - 1
    other = other_is_faster(torch.get_num_threads(), weight.dtype)[kind]
    return (OTHER_WAYS[weight.dtype] if other else F.linear)(x, weight, bias)


@cache
def other_is_faster(threads: int, dtype: torch.dtype) -> tuple[bool, ...]:
    """For each kind of products, whether the other way is clearly faster, with so many threads."""
    return settled(path_of(threads, str(dtype)), partial(_measured, dtype))


def settled(path: Path, measure: Callable[[], tuple[bool, ...]]) -> tuple[bool, ...]:
    """What was measured, now or in another process."""
    with contextlib.suppress(InputError):
        found = read_json(path, "measured products") if path.is_file() else None
        if isinstance(found, list) and list(map(type, found)) == [bool] * len(KINDS_FROM):
            return tuple(found)
    # Modes that watch or change operators are not to see these. In a thread of its own they would
    # not either, but OpenMP lets workers sleep after every operator where there are several teams.
    function_modes = torch._C.DisableTorchFunction()
    with _disable_current_modes(), function_modes, torch.autocast("cpu", enabled=False):
        faster = measure()
    _keep(path, faster)
    return faster


def numbers(*shape: int) -> Tensor:
    """Random ones to measure with; those that come next in the process stay what they would be."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def keep(threads: int, dtype: torch.dtype, faster: tuple[bool, ...]) -> None:
    """Have `other_is_faster` say this from now on, in processes that start later as well."""
    _keep(path_of(threads, str(dtype)), faster)
    other_is_faster.cache_clear()


def _keep(path: Path, faster: tuple[bool, ...]) -> None:
    with contextlib.suppress(OSError, InputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(faster))


def path_of(threads: int, *question: object) -> Path:
    """Where the answer to a question is kept."""
    facts = [cpu_kind(), torch.__version__, threads, MEASURED, _WEIGHTS, *question]
    return cache_folder() / "products" / f"{digest_of(facts)[:32]}.json"


@torch.no_grad()
def _measured(dtype: torch.dtype) -> tuple[bool, ...]:
    weights, other = [numbers(*shape).to(dtype) for shape in _WEIGHTS], OTHER_WAYS[dtype]
    found = []
    for rows in MEASURED:
        times = [
            ratio(partial(other, x, weight, None), partial(F.linear, x, weight))
            for weight in weights
            for x in [numbers(rows, weight.shape[1]).to(dtype)]
        ]
        found.append(math.prod(times) < CLEARLY ** len(times))
    return tuple(found)


def ratio(way: Callable[[], Tensor], usual: Callable[[], Tensor]) -> float:
    """Time of one way over the other: the least of interleaved rounds, as others may run too."""
    seconds = [math.inf, math.inf]
    rounds, started = 0, time.perf_counter()
    while rounds < _ROUNDS or time.perf_counter() - started < _SECONDS:
        for index, multiply in enumerate((way, usual)):
            begin = time.perf_counter()
            multiply()
            seconds[index] = min(seconds[index], time.perf_counter() - begin)
        rounds += 1
    return seconds[0] / seconds[1]
