"""Operators as models run them, at sizes that plans produce: what is measured of a device.

A case names the table of `planner.ir.cost.measured_device` that it belongs to, and sizes along the
table's axes. Weights are taken in turn from a few megabytes, which caches hold, or from a pool that
no cache holds, as in a model whose layers follow one another.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from planner.ir.cost.measured_device import ACTIVATIONS
from planner.kernels.ops.kept_linear import ONEDNN
from planner.kernels.ops.product_probe import by_onednn, turned
from planner.kernels.ops.project_rows import ACTIVATIONS as FUNCTIONS
from planner.models.running.growing_cache import GrowingLayer

_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
_FEATURES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 11008)
# Where weights from memory are measured beside cached ones; more rows wait for them as long.
_FEW_ROWS, _SQUARES = (1, 4, 16, 64, 128), (256, 512, 1024)
# Where backends are compared.
_COMPARED = (256, 512, 1024, 2048)
_HEADS = (1, 2, 4, 8, 16, 32, 64)  # or KV heads
_TOKENS = (8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048)
_KEYS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_WIDTHS = (32, 64, 128)
_SHARING = (1, 4)
# From 32 MiB on the C library asks for fresh pages every time, and they take long.
_ELEMENTS = (*(2**power for power in range(8, 23)), 2**23 - 2**15, 2**23, 2**24)
_WIDTH = 1024
LIGHT = (
    *("rms_norm", "layer_norm", *ACTIVATIONS),
    *("add", "multiply", "rotary", "softmax", "gather"),
)
AXES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "product": (_ROWS, _FEATURES, _FEATURES),
    "weights": (_FEW_ROWS,),
    "cached": ((4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384),),
    "prefill": (_HEADS, tuple(tokens**2 for tokens in _TOKENS), _WIDTHS),
    "decode": (_HEADS, _KEYS, _WIDTHS, _SHARING),
    **dict.fromkeys(LIGHT, (_ELEMENTS,)),
}
# Elements of keys that no cache near a core holds.
_COLD = 2**21
_POOL_MEGABYTES = {"cpu": 384, "cuda": 2048}
_CACHED_MEGABYTES = 8
# Features of the products that tell how much weight caches hold.
_CACHED_FEATURES = 1024
# The most operations of one case. What is larger is limited by arithmetic, and takes as much more.
MOST_OPERATIONS = {"cpu": 3e9, "cuda": 2e12}
_HELD_OUT = {
    "product": 60,
    "cold": 20,
    "prefill": 15,
    "decode": 15,
    **dict.fromkeys(LIGHT, 2),
}


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    ``cold`` is a product with weights from memory; ``weights`` what it takes more than with weights
    that caches hold. Neither has a table of its sizes.
    """

    table: str
    sizes: tuple[int, ...]
    backend: str = ""  # of a product: what multiplies

    @property
    def is_product(self) -> bool:
        """Whether its sizes are rows, in and out features."""
        return self.table in ("product", "cold", "weights")

    def of(self, table: str) -> Case:
        """The same product otherwise."""
        return replace(self, table=table)

    @property
    def key(self) -> str:
        """A name for it."""
        return ".".join(map(str, (self.table, self.backend, *self.sizes)))

    @property
    def operations(self) -> float:
        """About how many it takes."""
        each = 2 if self.is_product else {"prefill": 4}.get(self.table, 1)
        return each * math.prod(self.sizes)


@dataclass(frozen=True)
class Bench:
    """Where operators run, and with numbers of which precision."""

    place: torch.device
    dtype: torch.dtype

    @cached_property
    def backends(self) -> Mapping[str, Callable[[Tensor, Tensor, None], Tensor]]:
        """What multiplies here."""
        if self.place.type == "cuda":
            return {"cublas": F.linear}
        usual, other = {
            torch.float32: ("mkl", {"onednn": by_onednn}),
            torch.bfloat16: ("onednn", {"turned": turned}),
        }[self.dtype]
        return {usual: F.linear} | (other if ONEDNN else {})

    @cached_property
    def pool(self) -> Tensor:
        """More weights than a cache holds."""
        megabytes = _POOL_MEGABYTES[self.place.type]
        numbers = torch.randn(megabytes * 2**18, device=self.place) / 32
        return numbers.to(self.dtype).repeat(4 // self.dtype.itemsize)

    def random(self, *shape: int) -> Tensor:
        """Random numbers, to be read only."""
        return self.pool[: math.prod(shape)].view(shape)

    def compared(self) -> list[Case]:
        """Products by every backend, where there are several."""
        sizes = itertools.product(_ROWS, _COMPARED, _COMPARED)
        cases = self._at_hand(Case("product", size) for size in sizes)
        several = self.backends if len(self.backends) > 1 else ()
        return [replace(case, backend=backend) for case in cases for backend in several]

    def cases(self) -> list[Case]:
        """At all sizes of the tables, as far as they are not too large."""
        grid = [
            Case(t, sizes)
            for t, axes in AXES.items()
            if t != "weights"
            for sizes in itertools.product(*axes)
        ]
        squares = [Case("weights", (r, f, f)) for r in _FEW_ROWS for f in _SQUARES]
        return self._at_hand([*grid, *squares])

    def held_out(self, seed: int = 0) -> list[Case]:
        """At sizes between those of the tables, random ones such as plans have."""
        rng = random.Random(seed)
        drawn = []
        for table, count in _HELD_OUT.items():
            like = "product" if table == "cold" else table
            axes = range(len(AXES[like]))
            for _ in range(count):
                drawn.append(Case(table, tuple(_between(rng, like, axis) for axis in axes)))
        return self._at_hand(drawn)

    def _at_hand(self, cases: Iterable[Case]) -> list[Case]:
        found, most = [], self.pool.nbytes // 2
        for case in dict.fromkeys(cases):
            fits = case.operations <= MOST_OPERATIONS[self.place.type]
            weight = math.prod(case.sizes[1:]) if case.is_product else 0
            size = weight * self.dtype.itemsize
            if fits and size <= most:
                found.append(case)
        return found

    def turns(self, case: Case) -> int:
        """How many runs of a case make a whole; 0 where any number does."""
        if case.table != "cached":
            return 0
        return max(1, case.sizes[0] * 2**20 // (_CACHED_FEATURES**2 * self.dtype.itemsize))

    def runs(self, case: Case, count: int) -> Sequence[Callable[[], Any]]:
        """So many calls of a case's operator."""
        if case.table == "cached":
            sizes = (1, _CACHED_FEATURES, _CACHED_FEATURES)
            first = next(iter(self.backends))
            return self._products(first, sizes, case.sizes[0], 0, count)
        if case.table == "product":
            return self._products(case.backend, case.sizes, _CACHED_MEGABYTES, 0, count)
        if case.table == "cold":
            start = random.Random(case.key).randrange(2**20)
            return self._products(case.backend, case.sizes, 2**20, start, count)
        return [_OPERATORS[case.table](self, *case.sizes)] * count

    def _products(
        self, backend: str, sizes: Sequence[int], megabytes: int, start: int, count: int
    ) -> Sequence[Callable[[], Any]]:
        """Products with weights from the first megabytes of the pool, in turn."""
        rows, features, out = sizes
        # A row of weights begins where memory for a weight of its own would.
        size = -(-features * out // 64) * 64
        held = min(self.pool.numel(), megabytes * 2**20 // self.dtype.itemsize)
        places = (size * ((start + n) % max(1, held // size)) for n in range(count))
        weights = [self.pool[at : at + features * out].view(out, features) for at in places]
        multiply, x = self.backends[backend], self.random(rows, features)
        return [partial(multiply, x, weight, None) for weight in weights]


def _between(rng: random.Random, table: str, axis: int) -> int:
    """A random size within an axis of a table, as likely small as large."""
    sizes = AXES[table][axis]
    if (table, axis) in (("prefill", 2), ("decode", 2), ("decode", 3)):
        return rng.choice(sizes)
    drawn = round(math.exp(rng.uniform(math.log(sizes[0]), math.log(sizes[-1]))))
    if (table, axis) == ("prefill", 1):
        return round(math.sqrt(drawn)) ** 2
    # Heads and groups of neurons are as wide, or a multiple of it.
    return drawn if table == "decode" or axis == 0 else -(-drawn // 32) * 32


# -- operators besides products -------------------------------------------------------------------


def _prefill(bench: Bench, heads: int, pairs: int, width: int) -> Callable[[], Any]:
    """Attention of a prompt, and its keys and values into an empty cache."""
    tokens = math.isqrt(pairs)
    query, keys, values = (bench.random(1, tokens, heads, width).transpose(1, 2) for _ in range(3))
    module: Any = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False)

    def run() -> None:
        stored = GrowingLayer().update(keys, values)
        sdpa_attention_forward(module, query, *stored, None)

    return run


def _decode(bench: Bench, groups: int, keys: int, width: int, sharing: int) -> Callable[[], Any]:
    """Attention of a token, and its key and value into the cache of one layer after another."""
    query = bench.random(1, 1, groups * sharing, width).transpose(1, 2)
    new = [bench.random(1, 1, groups, width).transpose(1, 2) for _ in range(2)]
    many = min(32, 1 + _COLD // (groups * keys * width))
    layers = [GrowingLayer() for _ in range(many)]
    for layer in layers:
        layer.update(*(bench.random(1, groups, keys, width) for _ in range(2)))
    module: Any = SimpleNamespace(num_key_value_groups=sharing, is_causal=True, training=False)
    next_layer = itertools.cycle(layers)

    def run() -> None:
        layer = next(next_layer)
        layer.keys, layer.values = (t[..., : keys - 1, :] for t in (layer.keys, layer.values))
        sdpa_attention_forward(module, query, *layer.update(*new), None)

    return run


def _rows(bench: Bench, elements: int) -> Tensor:
    return bench.random(1, max(1, elements // _WIDTH), min(_WIDTH, elements))


def _rms_norm(bench: Bench, elements: int) -> Callable[[], Any]:
    x = _rows(bench, elements)
    return partial(LlamaRMSNorm(x.shape[-1]).to(bench.place, bench.dtype), x)


def _layer_norm(bench: Bench, elements: int) -> Callable[[], Any]:
    x = _rows(bench, elements)
    return partial(torch.nn.LayerNorm(x.shape[-1]).to(bench.place, bench.dtype), x)


def _activation(function: Callable[[Tensor], Tensor], bench: Bench, elements: int) -> Any:
    return partial(function, _rows(bench, elements))


def _two(function: Callable[[Tensor, Tensor], Tensor], bench: Bench, elements: int) -> Any:
    return partial(function, _rows(bench, elements), _rows(bench, elements))


def _rotary(bench: Bench, elements: int) -> Callable[[], Any]:
    width, heads = 64, max(1, min(_WIDTH, elements) // 64)
    tokens = max(1, elements // (heads * width))
    x = bench.random(1, tokens, heads, width).transpose(1, 2)
    cosine, sine = bench.random(1, 1, tokens, width), bench.random(1, 1, tokens, width)
    return lambda: x * cosine + rotate_half(x) * sine


def _softmax(bench: Bench, elements: int) -> Callable[[], Any]:
    x = _rows(bench, elements)
    return lambda: F.softmax(x, -1, dtype=torch.float32).to(bench.dtype)


def _gather(bench: Bench, elements: int) -> Callable[[], Any]:
    x = _rows(bench, elements)[0]
    places = torch.randint(len(x), (len(x),), device=bench.place)
    return partial(torch.index_select, x, 0, places)


_OPERATORS: Mapping[str, Callable[..., Callable[[], Any]]] = {
    "prefill": _prefill,
    "decode": _decode,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "silu": partial(_activation, FUNCTIONS["silu"]),
    "gelu": partial(_activation, FUNCTIONS["gelu"]),
    "gelu_tanh": partial(_activation, FUNCTIONS["gelu_pytorch_tanh"]),
    "sigmoid": partial(_activation, FUNCTIONS["quick_gelu"]),
    "add": partial(_two, torch.add),
    "multiply": partial(_two, torch.mul),
    "rotary": _rotary,
    "softmax": _softmax,
    "gather": _gather,
}
