"""Tile sizes, chosen by a cost model from shapes, element size and target; nothing is timed.

Deterministic and pure Python, so that the same tile is compiled ahead of time and launched later.
The model is a roofline per streaming multiprocessor: a tile's inner step takes the longest of its
multiply-adds, its loads through L2, and its share of memory bandwidth; tiles run in waves. It has
to rank tiles, not to predict seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, replace
from functools import cache, lru_cache
from itertools import product
from math import ceil, sqrt
from typing import TYPE_CHECKING, TypeVar

from planner.ir.cost.device_table import device
from planner.ir.errors import InputError, check_known

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Seconds from issuing a load to having the data, under load.
_LATENCY = 1e-6


@dataclass(frozen=True)
class Target:
    """A GPU architecture, as one of its devices has it."""

    capability: int  # compute capability, 80 for sm_80
    device: str  # row of the device table, which has dense half-precision peaks and bandwidth
    processors: int  # streaming multiprocessors
    shared_bytes: int  # shared memory one program may use
    l2_gb_per_s: float  # of the L2 cache, all processors together
    warpgroup: bool  # whether the tensor cores want 64 rows per four warps (wgmma)

    def roofline(self, operations: float, moved: float) -> float:
        """Seconds of some operations and bytes moved, whichever takes longer."""
        peak = device(self.device)
        return max(operations / peak.operations_per_second, moved / peak.bytes_per_second)


# Shared memory per program: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability" (1 KiB less than the processor has). L2: 5,120 bytes a clock (A100 whitepaper) at
# boost clock; the same width is assumed for H100, half of it for L40 and A40.
TARGETS: dict[str, Target] = {
    "sm_80": Target(80, "a100-80g", 108, 163 * 1024, 7200.0, False),
    "sm_86": Target(86, "a40", 84, 99 * 1024, 3600.0, False),
    "sm_89": Target(89, "l40", 142, 99 * 1024, 6300.0, False),
    "sm_90": Target(90, "h100-sxm", 132, 227 * 1024, 9000.0, True),
}


def target_of(capability: tuple[int, int]) -> Target:
    """The target of a compute capability: the closest described one that is not newer.

    Consumer Blackwell (12.x) has the shared memory of sm_89 and no wgmma, so it is tiled like that.
    Raises InputError: older than every described target.
    """
    number = capability[0] * 10 + capability[1] if capability[0] < 12 else 89
    older = [target for target in TARGETS.values() if target.capability <= number]
    if not older:
        raise InputError(f"Compute capability {number / 10} is not supported; 8.0 is the oldest.")
    return max(older, key=lambda target: target.capability)


@cache
def target_of_device(gpu: torch.device) -> Target:
    """The target of a CUDA device."""
    import torch

    return target_of(torch.cuda.get_device_capability(gpu))


def targets_of(names: Collection[str]) -> dict[str, Target]:
    """Targets by name, each once; InputError where one is unknown."""
    for name in names:
        check_known("target", name, TARGETS)
    return {name: TARGETS[name] for name in names}


@dataclass(frozen=True)
class Tile:
    """One program's share of a matrix product."""

    # Rows, output columns and depth of a step.
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int  # steps in flight
    group_rows: int = 8  # row tiles per band (see `primitives.tile_order`)


@dataclass(frozen=True)
class AttentionTile:
    """One program's share of an attention: `block_m` queries, `block_n` keys a step."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def vector(width: int) -> int:
    """The largest power of two up to 8 that divides a unit's width: features in one vector."""
    return min(width & -width, 8)


@dataclass(frozen=True)
class Product:
    """What a tile is chosen for: ``(rows, depth) x (depth, columns)``, once per sample."""

    rows: int  # per sample
    columns: int
    depth: int
    target: Target
    samples: int = 1  # products with plans of their own
    element_bytes: int = 2  # of activations and weights
    parts: int = 1  # weight rows per output column (2 for gate and up)
    accumulators: int = 64  # float32 per thread that the kernel's epilogue leaves registers for
    # Columns, or depth, of the weight before narrowing: tells products of one weight under several
    # plans from those of another.
    whole: int = 0


# A tile that was measured to be faster than the model's, if there is one.
Chooser = Callable[[Product], Tile | None]
_chooser: ContextVar[Chooser | None] = ContextVar("chooser", default=None)


@contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Give a context variable a value, inside the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def tiles_chosen_by(choose: Chooser) -> AbstractContextManager[None]:
    """Ask `choose` for tiles of products first, inside the block."""
    return holding(_chooser, choose)


def matmul_tile(product: Product) -> Tile:
    """The tile of a product; InputError where none fits.

    Rows are rounded up to a power of two first: a prompt one token longer must not bring another
    tile, hence another compilation.
    """
    wanted = replace(product, rows=power_of_two(max(product.rows, 16)))
    choose = _chooser.get()
    return (choose(wanted) if choose else None) or best_tile(wanted)


@lru_cache(maxsize=1024)
def best_tile(wanted: Product) -> Tile:
    """The tile that the model expects to be the fastest; of rows as given."""
    return ranked_tiles(wanted)[0]


def ranked_tiles(wanted: Product) -> list[Tile]:
    """Tiles that fit, the fastest by the model first; InputError where none fits."""

    def cost(tile: Tile) -> tuple[float, ...]:
        # Of equal ones those with the least shared memory, then in a fixed order.
        return matmul_seconds(tile, wanted), _shared_bytes(tile, wanted), *astuple(tile)

    ranked = sorted(_candidates(wanted), key=cost)
    if not ranked:
        sizes = f"{wanted.rows} x {wanted.columns} x {wanted.depth}"
        raise InputError(f"No tile for {sizes} fits into shared memory.")
    return ranked


def _candidates(wanted: Product) -> Iterator[Tile]:
    target, parts = wanted.target, wanted.parts
    # Without wgmma the operands pass through registers too.
    room = wanted.accumulators if target.warpgroup else min(wanted.accumulators, 64)
    for m, wide, k, warps, stages in product(
        (16, 32, 64, 128), (32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)
    ):
        # A step reads whole 128-byte cache lines of every row.
        if m > wanted.rows or wide < 16 * parts or k * wanted.element_bytes < 128:
            continue
        # Each warp must own a whole instruction tile: 16 rows by 8 columns, or 64 rows by 8
        # columns per four warps. Fewer leave warps that compute the same thing twice.
        owners = ceil(m / 64) * 4 * (wide // 32) if target.warpgroup else (m // 16) * (wide // 16)
        if warps > max(4, owners):
            continue
        tile = Tile(m, wide // parts, k, warps, stages)
        if _shared_bytes(tile, wanted) > target.shared_bytes:
            continue
        if m * wide > room * 32 * warps:
            continue
        yield tile


def _shared_bytes(tile: Tile, wanted: Product) -> int:
    step = (tile.block_m + tile.block_n * wanted.parts) * tile.block_k * wanted.element_bytes
    store = tile.block_m * tile.block_n * 4  # the epilogue's transposition reuses the space
    return max(tile.stages * step, store)


def matmul_seconds(tile: Tile, wanted: Product) -> float:
    """What a product takes with a tile, by the model."""
    rows, columns, depth = wanted.rows, wanted.columns, wanted.depth
    target, element_bytes, peak = wanted.target, wanted.element_bytes, device(wanted.target.device)
    wide = tile.block_n * wanted.parts
    programs = wanted.samples * ceil(rows / tile.block_m) * ceil(columns / tile.block_n)
    resident = min(
        16 // tile.warps,
        target.shared_bytes // _shared_bytes(tile, wanted),
        max(1, 65536 // (32 * tile.warps * (tile.block_m * wide // (32 * tile.warps) + 90))),
    )
    resident = max(1, resident)
    # Tiles that the busiest processor works through, some of them at the same time.
    load = ceil(programs / target.processors)
    flops = peak.operations_per_second / target.processors
    if target.warpgroup and tile.block_m < 64:
        flops *= 0.6  # mma.sync reaches this share of wgmma's peak
    flops *= min(1.0, sqrt(tile.block_m * wide) / 128)  # operand reuse out of shared memory
    step_bytes = (tile.block_m + wide) * tile.block_k * element_bytes
    in_flight = min(resident, load) * (tile.stages - 1) * step_bytes
    l2 = min(target.l2_gb_per_s * 1e9 / target.processors, in_flight / _LATENCY)
    multiply, load_bytes = 2 * tile.block_m * wide * tile.block_k / flops, step_bytes / l2
    # The two overlap, but never perfectly.
    step = max(multiply, load_bytes) + 0.1 * min(multiply, load_bytes)
    # Filling the pipeline and storing the result; overlapped by the other tiles in residence.
    fixed = 2 * _LATENCY + tile.block_m * tile.block_n * element_bytes / l2
    compute = load * ceil(depth / tile.block_k) * step + ceil(load / resident) * fixed
    weights = columns * wanted.parts * depth
    moved = wanted.samples * (rows * depth + weights + rows * columns) * element_bytes
    reach = min(programs, target.processors * resident) * (tile.stages - 1) * step_bytes / _LATENCY
    return max(compute, moved / min(peak.bytes_per_second, reach))


@lru_cache(maxsize=256)
def attention_tile(
    tokens: int, head_dim: int, target: Target, *, element_bytes: int = 2
) -> AttentionTile:
    """The tile of causal prefill: as many queries as registers hold, keys to fill the pipeline.

    Accumulators are (block_m, head_dim) and (block_m, block_n) float32 at once.
    """
    width = max(16, power_of_two(head_dim))
    block_m = min(128 if width <= 128 and element_bytes == 2 else 64, power_of_two(max(tokens, 16)))
    warps = 8 if block_m == 128 or width >= 256 else 4
    # Without wgmma, scores pass through registers into the second product.
    block_n = 64 if width * element_bytes <= (256 if target.warpgroup else 128) else 32
    budget = target.shared_bytes - block_m * width * element_bytes
    stages = max(1, min(3, budget // (2 * block_n * width * element_bytes)))
    return AttentionTile(block_m, block_n, warps, stages)


@lru_cache(maxsize=256)
def decode_tile(head_dim: int, target: Target, *, element_bytes: int = 2) -> AttentionTile:
    """The tile of one decode step: bytes in flight are what counts."""
    width = max(16, power_of_two(head_dim))
    block_n = 64 if width * element_bytes <= 256 else 32
    stages = max(1, min(3, target.shared_bytes // (4 * block_n * width * element_bytes)))
    return AttentionTile(16, block_n, 4, stages)


@lru_cache(maxsize=256)
def decode_splits(heads: int, keys: int, target: Target, *, block_n: int = 64) -> int:
    """Into how many parts keys are divided: enough to fill the GPU twice.

    Args:
        heads: samples times groups, the programs that there are without splitting.
        keys: an upper bound of the cached tokens.
        block_n: keys per step; a part is at least two steps.
    """
    wanted = ceil(2 * target.processors / max(1, heads))
    most = max(1, keys // (2 * block_n))
    return min(power_of_two(wanted), 64, power_of_two(most))
