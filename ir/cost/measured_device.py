"""A device as it was measured: seconds of operators at a grid of sizes, and between them.

Between measured sizes seconds are linear in each size. What a roofline says is just that on either
side of its bend - compute is a product of sizes, memory a sum of such products - so there the
interpolation is exact, and it grows with every size. Beyond the largest measured size seconds grow
in proportion to it; below the smallest they stay.

What operators take alone is not all that a pass takes: there is the host's work between them, and
data that was in a cache. So each operator takes, besides, a constant, and a factor of its sort.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from typing_extensions import override

from planner.ir.cost.device_table import Device
from planner.ir.dims import Sizes
from planner.ir.errors import InputError
from planner.ir.graph import Operator
from planner.ir.kinds import kind_of
from planner.ir.kinds.table import attended_keys

# Bytes of a number -> how it is called.
PRECISIONS = {4: "float32", 2: "bfloat16"}


@dataclass(frozen=True)
class Table:
    """Seconds by sizes."""

    axes: tuple[tuple[float, ...], ...]  # the sizes that were measured, ascending
    seconds: tuple[float, ...]  # one for every combination, the last axis running fastest

    def __post_init__(self) -> None:
        if any(not a or a[0] <= 0 or any(x >= y for x, y in pairwise(a)) for a in self.axes):
            raise ValueError("the axes of a table ascend")
        if len(self.seconds) != math.prod(map(len, self.axes)) or min(self.seconds) <= 0:
            raise ValueError("a table has a positive number for every combination of sizes")

    def at(self, *sizes: float) -> float:
        """Seconds at some sizes, one for each axis."""
        beyond, corners = 1.0, [(0, 1.0)]
        for axis, size in zip(self.axes, sizes, strict=True):
            beyond *= max(1.0, size / axis[-1])
            size = min(max(size, axis[0]), axis[-1])
            low = min(bisect_right(axis, size) - 1, len(axis) - 2) if len(axis) > 1 else 0
            share = (size - axis[low]) / (axis[low + 1] - axis[low]) if len(axis) > 1 else 0.0
            ends = [(low, 1 - share), (low + 1, share)]
            corners = [
                (index * len(axis) + place, weight * part)
                for index, weight in corners
                for place, part in ends
                if part
            ]
        return beyond * sum(self.seconds[index] * weight for index, weight in corners)


@dataclass(frozen=True)
class Measurement:
    """What was measured with numbers of one precision."""

    # By name: ``product`` (rows, in, out), ``prefill`` (heads of all samples, pairs of query and
    # key, head_dim), ``decode`` (KV heads of all samples, keys, head_dim, heads that share a KV
    # head), and light work by elements of its output. Kinds of operators without a table take what
    # the roofline says.
    tables: Mapping[str, Table]
    operator_seconds: float = 0.0  # what each operator takes in a model besides
    pass_seconds: float = 0.0  # what a pass through a model takes besides its operators
    # Sort of operators (`sort_of`) -> what they take in a model over what they take alone.
    factors: Mapping[str, float] = field(default_factory=dict)
    # Of what -> quantile -> relative error of predictions, at sizes and under plans that nothing
    # was fitted to; ``late`` is by which share passes took longer at most.
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MeasuredDevice(Device):
    """A device that was measured; peak and bandwidth are the best that was seen."""

    # Processor, threads, versions of libraries.
    machine: Mapping[str, str | int] = field(default_factory=dict)
    measured: Mapping[str, Measurement] = field(default_factory=dict)  # by precision

    def at(self, element: int) -> Measurement:
        """What was measured with numbers of so many bytes; InputError where nothing was."""
        precision = PRECISIONS.get(element, f"{element} bytes")
        if precision not in self.measured:
            raise InputError(
                f"the device '{self.name}' was not measured in {precision}: run planner calibrate "
                f"--dtype {precision}, or take a model in {', '.join(self.measured)}"
            )
        return self.measured[precision]

    def alone(self) -> MeasuredDevice:
        """The same, where nothing is added to what operators take alone."""
        bare = {name: Measurement(found.tables) for name, found in self.measured.items()}
        return replace(self, measured=bare)

    @override
    def pass_seconds(self, element: int) -> float:
        return self.at(element).pass_seconds

    @override
    def late(self, element: int) -> float:
        return self.at(element).errors.get("passes", {}).get("late", 0.0)

    @override
    def time(
        self, operator: Operator, sizes: Sizes, operations: int, elements: int, element: int
    ) -> tuple[float, str]:
        # What no table is of takes what the roofline says.
        seconds, bound = self.roofline(operations, elements * element)
        known, sized = self.at(element), _SIZED.get(operator.kind)
        if sized is not None:
            name, size = sized(operator, sizes)
            if name in known.tables:
                seconds = known.tables[name].at(*size)
        return known.factors.get(sort_of(operator), 1.0) * seconds + known.operator_seconds, bound


# -- which sizes matter, by kind of operator ------------------------------------------------------

_Sized = tuple[str, tuple[float, ...]]
# Functions that are measured; others take as long as the first.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "sigmoid")


def _product(o: Operator, n: Sizes) -> _Sized:
    return "product", (o.rows(n), o.integer("in"), o.integer("out"))


def _convolution(o: Operator, n: Sizes) -> _Sized:
    """The product that it is, with a row for each place."""
    out = o.integer("out")
    return "product", (o.elements(n) // out, o.integer("in") * o.integer("kernel"), out)


def _attention(o: Operator, n: Sizes) -> _Sized:
    *samples, heads, queries, _ = (dim.evaluate(n) for dim in o.shape)
    heads, keys = math.prod(samples) * heads, attended_keys(o, n)
    width = o.integer("head_dim")
    if queries == 1:
        sharing = o.integer("heads") // o.integer("kv_heads")
        return "decode", (heads // sharing, keys, width, sharing)
    return "prefill", (heads, queries * keys, width)


def _norm(o: Operator, n: Sizes) -> _Sized:
    is_rms = not o.integer("bias") and not o.get("centred")
    return "rms_norm" if is_rms else "layer_norm", (o.elements(n),)


def _activation(o: Operator, n: Sizes) -> _Sized:
    function = o["function"]
    return str(function) if function in ACTIVATIONS else ACTIVATIONS[0], (o.elements(n),)


def _light(name: str) -> Callable[[Operator, Sizes], _Sized]:
    return lambda o, n: (name, (o.elements(n),))


_SIZED: dict[str, Callable[[Operator, Sizes], _Sized]] = {
    "linear": _product,
    "fused_linear": _product,
    "norm_linear": _product,
    "conv": _convolution,
    "attention": _attention,
    "norm": _norm,
    "activation": _activation,
    "rotary": _light("rotary"),
    "softmax": _light("softmax"),
    "add": _light("add"),
    "multiply": _light("multiply"),
    "elementwise": _light("multiply"),
    "embedding": _light("gather"),
    "gather": _light("gather"),
    "select_tokens": _light("gather"),
}
SORTS = ("products", "attention", "light")


def sort_of(operator: Operator) -> str:
    """What a factor of `Measurement` is of: one of `SORTS`."""
    if operator.kind == "attention":
        return "attention"
    return "products" if kind_of(operator).flops else "light"
