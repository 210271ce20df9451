"""A device as it was measured: seconds of operators at a grid of sizes, and between them.

Between measured sizes seconds are linear in each size. What a roofline says is just that on either
side of its bend - compute is a product of sizes, memory a sum of such products - so there the
interpolation is exact, and it grows with every size. Beyond the largest measured size seconds grow
in proportion to it; below the smallest they stay.

Products are measured with weights that lie in a cache, and what they take more with weights from
memory apart: which of the two a pass meets is a matter of the whole model's size.

What operators take alone is not all that a pass takes: there is the host's work between them, and
what their neighbours leave in caches. So a pass is a sum of terms (`TERMS`), each with a
coefficient that is fitted to whole passes: of any models, or of the one model that is priced; and
of prompts apart from decoded tokens, where weights and the host decide.
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
from planner.ir.graph import Graph, Operator
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


KINDS = ("prompt", "token")
# What a pass is the sum of: a number of seconds for the pass and for each of its operators, and
# what operators take alone, by sort. ``weights`` is what products take more where their weights
# come from memory; ``encoder`` is all that runs in front of the decoder.
TERMS = ("pass", "operator", "products", "weights", "attention", "light", "encoder")
ALONE: Mapping[str, float] = {name: float(n > 1) for n, name in enumerate(TERMS)}


@dataclass(frozen=True)
class Passes:
    """What whole passes of one kind take, by what their operators take alone."""

    # Of `TERMS`: seconds, then factors. None is negative, so more never takes less.
    terms: Mapping[str, float] = field(default_factory=lambda: ALONE)
    # Of passes under plans that nothing was fitted to: quantile -> relative error of predictions.
    errors: Mapping[str, float] = field(default_factory=dict)
    # By which share such a pass takes longer than predicted once in a hundred times.
    late: float = 0.0

    def __post_init__(self) -> None:
        if set(self.terms) != set(TERMS) or min(self.terms.values()) < 0:
            raise ValueError(f"the terms of passes are {', '.join(TERMS)}, none of them negative")


@dataclass(frozen=True)
class Measurement:
    """What was measured with numbers of one precision."""

    # By name: ``product`` (rows, in, out), ``prefill`` (heads of all samples, pairs of query and
    # key, head_dim), ``decode`` (KV heads of all samples, keys, head_dim, heads that share a KV
    # head), and light work by elements of its output. Kinds of operators without a table take what
    # the roofline says. ``weights`` (rows): what a product takes more for a million weights that
    # come from memory. ``cached`` (megabytes): some product with so many weights in turn.
    tables: Mapping[str, Table]
    # By kind (`KINDS`): of any models, and of one model, by its fingerprint.
    passes: Mapping[str, Passes] = field(default_factory=lambda: dict.fromkeys(KINDS, Passes()))
    models: Mapping[str, Mapping[str, Passes]] = field(default_factory=dict)
    # Quantile -> relative error of predictions for operators at sizes between those of the tables.
    errors: Mapping[str, float] = field(default_factory=dict)
    # Seconds of the product that tells how fast the machine was: all else is told for this pace.
    pace: float = 1.0

    def __post_init__(self) -> None:
        if any(set(passes) != set(KINDS) for passes in (self.passes, *self.models.values())):
            raise ValueError(f"passes are of the kinds {', '.join(KINDS)}")
        if self.pace <= 0:
            raise ValueError("a machine's pace is a positive number of seconds")


@dataclass(frozen=True, slots=True)
class MeasuredDevice(Device):
    """A device that was measured; peak and bandwidth are the best that was seen."""

    # Processor, threads, versions of libraries.
    machine: Mapping[str, str | int] = field(default_factory=dict)
    measured: Mapping[str, Measurement] = field(default_factory=dict)  # by precision
    model: str = ""  # fingerprint of the model that is priced
    weight_bytes: float = math.inf  # of its weights

    def at(self, element: int) -> Measurement:
        """What was measured with numbers of so many bytes; InputError where nothing was."""
        precision = PRECISIONS.get(element, f"{element} bytes")
        if precision not in self.measured:
            raise InputError(
                f"the device '{self.name}' was not measured in {precision}: run planner calibrate "
                f"--dtype {precision}, or take a model in {', '.join(self.measured)}"
            )
        return self.measured[precision]

    def with_terms(self, element: int, terms: Mapping[str, float]) -> MeasuredDevice:
        """The same, with other coefficients for every pass."""
        precision = PRECISIONS[element]
        passes = dict.fromkeys(KINDS, Passes(terms))
        known = replace(self.measured[precision], passes=passes, models={})
        return replace(self, measured={precision: known})

    @override
    def on(self, graph: Graph) -> MeasuredDevice:
        weights = sum(kind_of(operator).weights(operator) for operator in graph)
        model = str(graph.properties.get("fingerprint", ""))
        return replace(self, model=model, weight_bytes=float(weights * graph.dtype_bytes))

    def knows(self, element: int) -> bool:
        """Whether passes of the model that is priced were measured."""
        return self.model in self.at(element).models

    def passes(self, element: int, kind: str) -> Passes:
        """What passes of the model that is priced take, or of any where it was not measured."""
        known = self.at(element)
        return known.models.get(self.model, known.passes)[kind]

    @override
    def pass_seconds(self, element: int, sizes: Sizes) -> float:
        return self.passes(element, _kind_of(sizes)).terms["pass"]

    @override
    def late(self, element: int) -> float:
        return self.passes(element, "prompt").late

    @override
    def time(
        self, operator: Operator, sizes: Sizes, operations: int, elements: int, element: int
    ) -> tuple[float, str]:
        seconds, bound = self.roofline(operations, elements * element)
        known, terms = self.at(element), self.passes(element, _kind_of(sizes)).terms
        alone = self._alone(known, operator, sizes) or {_sort_of(operator): seconds}
        if operator.part in ("vision", "projector"):
            alone = {"encoder": sum(alone.values())}
        taken = sum(terms[name] * part for name, part in alone.items())
        return taken + terms["operator"], bound

    def _alone(
        self, known: Measurement, operator: Operator, sizes: Sizes
    ) -> dict[str, float] | None:
        """Term -> seconds of an operator by itself; None where no table is of it."""
        sized = _SIZED.get(operator.kind)
        name, size = sized(operator, sizes) if sized is not None else ("", ())
        if name not in known.tables:
            return None
        alone = {_sort_of(operator): known.tables[name].at(*size)}
        if name == "product" and "weights" in known.tables:
            alone["weights"] = self._from_memory(known) * from_memory(known.tables, *size)
        return alone

    def _from_memory(self, known: Measurement) -> float:
        """The share of the model's weights that no cache holds from one pass to the next."""
        table = known.tables["cached"]
        (axis,), (least, most) = table.axes, (table.seconds[0], table.seconds[-1])
        now = table.at(min(self.weight_bytes / 2**20, axis[-1]))
        return (now - least) / (most - least) if most > least else 1.0


def from_memory(tables: Mapping[str, Table], rows: float, features: float, out: float) -> float:
    """What a product takes more where its weights come from memory."""
    table = tables["weights"]
    # More rows than were measured wait for their weights as long.
    return table.at(min(rows, table.axes[0][-1])) * features * out / 1e6


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


def _sort_of(operator: Operator) -> str:
    """The term that an operator of the decoder belongs to."""
    if operator.kind == "attention":
        return "attention"
    return "products" if kind_of(operator).flops else "light"


def _kind_of(sizes: Sizes) -> str:
    """The kind of a pass: one query is a token that is decoded."""
    return "token" if sizes.get("query") == 1 else "prompt"
