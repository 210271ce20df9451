"""Linears that compute with some of their features only.

A weight is narrowed in one of two ways. *Slices*: the kept features copied together, one product.
*Views*: one product for every run of kept features, straight from the stored weight, nothing
copied. In both, what is off is neither read nor multiplied.

A plan seen for the first time is copied into memory that the next such plan uses again: what lies
there already stays (`slots`), and no page is fresh, which would cost three times the copy. Once as
much has been copied for some lanes as they have features, they get a slice of their own. Views are
for rows that lie together anyway and for slices larger than allowed: a product over a short run has
more to do for each weight.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner.ir.intervals import Intervals, count_of
from planner.kernels.ops.kept_linear import kept_linear, suits
from planner.models.running.bindings import BoundLinear
from planner.models.running.lane_order import moves

__all__ = ["LinearForward", "Narrowed", "SliceStore"]

State = tuple[int, int, int]
# (to, source, features): features from `source` on of a weight go to `to` on of a narrowed one.
Pieces = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Narrowed:
    """The kept part of one linear.

    Attributes:
        axis: ``out`` or ``in``.
        weights: one per run, shape (kept of run, in features) or (out features, kept of run).
        biases: axis ``out``: one per run; axis ``in``: the whole bias, in a tuple of one.
        source: which parameter the weights were taken from, and in what state.

    To autograd these are constants: train with the masked executor. To torch.compile they are what
    the model's own weights are: parameters, which stay where they are and can be frozen.
    """

    axis: str
    weights: tuple[nn.Parameter, ...]
    biases: tuple[nn.Parameter | None, ...]
    source: State

    @staticmethod
    def of(
        linear: BoundLinear, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> Narrowed:
        """Of a linear as it is now."""
        constants = [nn.Parameter(weight, requires_grad=False) for weight in weights]
        optional = [
            None if bias is None else nn.Parameter(bias, requires_grad=False) for bias in biases
        ]
        state = _state(linear.parameter)
        return Narrowed(linear.binding.axis, tuple(constants), tuple(optional), state)

    def __call__(self, features: Tensor) -> Tensor:
        """Shape (..., in features) to (..., out features), either of them narrowed."""
        if self.axis == "out":
            parts = [kept_linear(features, w, b) for w, b in zip(self.weights, self.biases)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if len(self.weights) == 1:
            return kept_linear(features, self.weights[0], self.biases[0])
        rows = features.reshape(-1, features.shape[-1])
        parts = rows.split([weight.shape[1] for weight in self.weights], -1)
        total = F.linear(parts[0], self.weights[0], self.biases[0])
        for part, weight in zip(parts[1:], self.weights[1:], strict=True):
            # Into the same memory, the sum costs no pass over the output of its own.
            out = None if total.requires_grad else total
            total = torch.addmm(total, part, weight.t(), out=out)
        return total.reshape(*features.shape[:-1], -1)


def _state(parameter: Tensor) -> State:
    """Changes when the parameter is replaced, moved or written to."""
    version = 0 if parameter.is_inference() else parameter._version
    return id(parameter), parameter.data_ptr(), version


def _pieces(linear: BoundLinear, lanes: Intervals, held: Intervals = ()) -> Pieces:
    """What of a weight to copy where, so that memory that holds some lanes holds others."""
    if held == lanes != ():
        return ()
    pieces = []
    place = 0
    if not linear.records:
        for start, stop in linear.runs(lanes):
            pieces.append((place, start, stop - start))
            place += stop - start
        return tuple(pieces)
    count, before = count_of(lanes), count_of(held)
    # Behind the first block everything moves where the number of lanes changes.
    known = held if count == before or len(linear.records) == 1 else ()
    for offset, stride in linear.records:
        for slot, lane, number in moves(lanes, known):
            pieces.append((place + slot * stride, offset + lane * stride, number * stride))
        place += count * stride
    return tuple(pieces)


def _bias(linear: BoundLinear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def _views(linear: BoundLinear, pieces: Pieces) -> Narrowed:
    """Narrow without copying anything."""
    axis, weight, bias = linear.binding.axis, linear.weight.detach(), _bias(linear)
    pieces = pieces or ((0, 0, 0),)
    dim = 0 if axis == "out" else 1
    weights = [weight.narrow(dim, source, number) for _, source, number in pieces]
    biases = [bias]
    if axis == "out":
        biases = [None if bias is None else bias.narrow(0, s, n) for _, s, n in pieces]
    return Narrowed.of(linear, weights, biases)


@torch.no_grad()
def _slice(linear: BoundLinear, lanes: Intervals, memory: Tensor, held: Intervals = ()) -> Narrowed:
    """Narrow by copying.

    Args:
        linear: what to narrow.
        lanes: what to keep.
        memory: shape of the weight, but along the narrowed axis the size of what is kept, at least.
        held: lanes that the memory holds already.
    """
    axis, weight, bias = linear.binding.axis, linear.weight.detach(), _bias(linear)
    dim = 0 if axis == "out" else 1
    for place, source, number in _pieces(linear, lanes, held):
        # Copies run on all threads, `torch.cat` on one.
        memory.narrow(dim, place, number).copy_(weight.narrow(dim, source, number))
    pieces = _pieces(linear, lanes)
    if axis == "out" and bias is not None:
        bias = torch.cat([bias.narrow(0, source, number) for _, source, number in pieces])
    return Narrowed.of(linear, [memory.narrow(dim, 0, _count(pieces))], [bias])


def _count(pieces: Pieces) -> int:
    return sum(number for _, _, number in pieces)


def _is_packed(linear: BoundLinear) -> bool:
    """Whether columns must lie without gaps, to be multiplied in the faster way."""
    return linear.binding.axis == "in" and suits(linear.weight)


@dataclass(eq=False)
class _Slots:
    """Memory as large as a weight, for one plan after the other.

    Of it only what is written is ever real.
    """

    memory: Tensor
    lanes: Intervals = ()
    source: State = (0, 0, 0)

    @staticmethod
    def of(linear: BoundLinear) -> _Slots:
        return _Slots(torch.empty_like(linear.weight.detach()))

    def fits(self, linear: BoundLinear) -> bool:
        """Whether this memory can be used for the weight as it is now."""
        mine, weight = self.memory, linear.weight
        return (mine.shape, mine.dtype, mine.device) == (weight.shape, weight.dtype, weight.device)

    def _held(self, linear: BoundLinear, lanes: Intervals) -> Intervals:
        """Of the lanes that lie here, those whose features may stay where they are."""
        if self.source != _state(linear.parameter):
            return ()
        moved = _is_packed(linear) and count_of(lanes) != count_of(self.lanes)
        return () if moved else self.lanes

    def missing(self, linear: BoundLinear, lanes: Intervals) -> int:
        """How many features have to be copied."""
        return _count(_pieces(linear, lanes, self._held(linear, lanes)))

    def hold(self, linear: BoundLinear, lanes: Intervals) -> Narrowed:
        """Copy what is not there yet."""
        held, self.lanes = self._held(linear, lanes), ()
        memory = self.memory
        if _is_packed(linear):
            shape = len(memory), _count(_pieces(linear, lanes))
            memory = memory.flatten()[: shape[0] * shape[1]].view(shape)
        narrowed = _slice(linear, lanes, memory, held)
        self.lanes, self.source = lanes, narrowed.source
        return narrowed


class SliceStore:
    """Narrows linears, and keeps the slices of plans that come again.

    Slices are kept up to a number of bytes; the least recently used leave first, except that those
    of the plan in use stay alive. A slice that is larger by itself is never made.

    Args:
        limit_bytes: bound on the slices held.
    """

    # Of how many lanes it is remembered what was copied for them.
    REMEMBERED = 4096

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._slices: OrderedDict[tuple[str, Intervals], Narrowed] = OrderedDict()
        # Features copied for lanes that have no slice of their own.
        self._copied: OrderedDict[tuple[str, Intervals], int] = OrderedDict()
        self._slots: dict[str, list[_Slots]] = {}
        self._lent: Counter[str] = Counter()

    def begin(self) -> None:
        """Declare that nothing handed out before is in use any more."""
        self._lent.clear()

    def get(self, linear: BoundLinear, lanes: Intervals, keep: bool = False) -> Narrowed:
        """The linear narrowed to lanes, in the order of `slots`; valid until `begin`.

        Args:
            linear: what to narrow.
            lanes: kept lanes as intervals.
            keep: make a slice at once, because the plan is to stay.
        """
        key = (linear.path, lanes)
        found = self._slices.get(key)
        if found is not None and found.source == _state(linear.parameter):
            self._slices.move_to_end(key)
            return found
        self._drop(key)
        return self._narrow(linear, lanes, keep)

    # Memory outlives the call that takes it, so it must not be that of inference tensors.
    @torch.inference_mode(False)
    def _narrow(self, linear: BoundLinear, lanes: Intervals, keep: bool) -> Narrowed:
        key, pieces = (linear.path, lanes), _pieces(linear, lanes)
        weight = linear.weight.detach()
        elements = weight.numel() // linear.features * _count(pieces)
        together = not pieces or (len(pieces) == 1 and not _is_packed(linear))
        if together or elements * weight.itemsize > self.limit_bytes:
            return _views(linear, pieces)
        if not keep and self._copied.get(key, 0) < _count(pieces):
            slots = self._lend(linear)
            self._copied[key] = self._copied.pop(key, 0) + slots.missing(linear, lanes)
            if len(self._copied) > self.REMEMBERED:
                self._copied.popitem(last=False)
            return slots.hold(linear, lanes)
        shape = list(weight.shape)
        shape[0 if linear.binding.axis == "out" else 1] = _count(pieces)
        narrowed = _slice(linear, lanes, weight.new_empty(shape))
        self._slices[key] = narrowed
        self.bytes += _bytes(narrowed)
        while self.bytes > self.limit_bytes:
            self._drop(next(iter(self._slices)))
        return narrowed

    def clear(self) -> None:
        """Forget everything."""
        self._slices.clear()
        self._copied.clear()
        self._slots.clear()
        self.bytes = 0

    def _lend(self, linear: BoundLinear) -> _Slots:
        """Memory that nobody has been lent since `begin`."""
        owned = self._slots.setdefault(linear.path, [])
        number = self._lent[linear.path]
        self._lent[linear.path] += 1
        if number == len(owned):
            owned.append(_Slots.of(linear))
        elif not owned[number].fits(linear):
            owned[number] = _Slots.of(linear)
        return owned[number]

    def _drop(self, key: tuple[str, Intervals]) -> None:
        narrowed = self._slices.pop(key, None)
        if narrowed is not None:
            self.bytes -= _bytes(narrowed)


def _whole(module: Any, features: Tensor) -> Tensor:
    return kept_linear(features, module.weight, module.bias)


def _bytes(narrowed: Narrowed) -> int:
    return sum(weight.nbytes for weight in narrowed.weights)


class LinearForward:
    """Stands in for one linear's ``forward``.

    Attributes:
        active: what to compute with; None is the base model.
        whole: computes with all features as narrowed linears do with some (`kept_linear`); None
            where that is the base model's way, or its code is not that of ``nn.Linear``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.stock: Any = module.forward
        self.active: Callable[[Tensor], Tensor] | None = None
        self.whole: Callable[[Tensor], Tensor] | None = None
        plain = getattr(self.stock, "__func__", None) is nn.Linear.forward
        if plain and suits(cast(Tensor, module.weight)):
            self.whole = partial(_whole, module)

    def __call__(self, features: Tensor) -> Tensor:
        """Shape (..., in features) to (..., out features), narrowed as `active` says."""
        return self.stock(features) if self.active is None else self.active(features)
