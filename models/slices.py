"""Linears that compute with some of their features only.

A weight is narrowed in one of two ways. *Views*: one matrix product for every run of kept
features, straight from the stored weight, nothing copied; right for a plan seen once. *Slices*:
the kept features copied together, one product; right for a plan seen again. In both, what is off
is neither read nor multiplied.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner.models.bindings import BoundLinear, Runs

__all__ = ["LinearForward", "Narrowed", "SliceStore"]


@dataclass(frozen=True, eq=False)
class Narrowed:
    """The kept part of one linear.

    Attributes:
        axis: ``out`` or ``in``.
        weights: one per run, shape (kept of run, in features) or (out features, kept of run).
        biases: axis ``out``: one per run; axis ``in``: the whole bias, in a tuple of one.
        source: which parameter the weights were taken from, and in what state.

    To autograd these are constants: train with the masked executor.
    """

    axis: str
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    source: tuple[int, int, int]

    def __call__(self, features: Tensor) -> Tensor:
        """Shape (..., in features) to (..., out features), either of them narrowed."""
        if self.axis == "out":
            parts = [F.linear(features, w, b) for w, b in zip(self.weights, self.biases)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if len(self.weights) == 1:
            return F.linear(features, self.weights[0], self.biases[0])
        rows = features.reshape(-1, features.shape[-1])
        parts = rows.split([weight.shape[1] for weight in self.weights], -1)
        total = F.linear(parts[0], self.weights[0], self.biases[0])
        for part, weight in zip(parts[1:], self.weights[1:], strict=True):
            # Accumulates inside the product: no pass over the output of its own.
            total = total.addmm_(part, weight.t())
        return total.reshape(*features.shape[:-1], -1)


def _state(parameter: Tensor) -> tuple[int, int, int]:
    """Changes when the parameter is replaced, moved or written to."""
    version = 0 if parameter.is_inference() else parameter._version
    return id(parameter), parameter.data_ptr(), version


# Slices outlive the call that makes them, so they must not be inference tensors.
@torch.inference_mode(False)
@torch.no_grad()
def _narrow(linear: BoundLinear, runs: Runs, copy: bool) -> Narrowed:
    axis, weight, bias = linear.binding.axis, linear.weight.detach(), linear.bias
    bias = None if bias is None else bias.detach()
    dim = 0 if axis == "out" else 1
    if not runs:
        runs = ((0, 0),)
    weights = [weight.narrow(dim, start, stop - start) for start, stop in runs]
    biases: list[Tensor | None] = [bias]
    if copy and len(runs) > 1:
        weights = [torch.cat(weights, dim)]
        if axis == "out" and bias is not None:
            biases = [torch.cat([bias[start:stop] for start, stop in runs])]
    elif axis == "out":
        biases = [None if bias is None else bias[start:stop] for start, stop in runs]
    return Narrowed(axis, tuple(weights), tuple(biases), _state(linear.parameter))


class SliceStore:
    """Hands out narrowed linears: views at first, slices from the second time on.

    Slices are kept up to a number of bytes, the least recently used leave first.

    Args:
        limit_bytes: bound on the copies held. Slices of a plan in use are alive beyond it.
    """

    # Lanes seen once are remembered for this many requests.
    REMEMBERED = 4096

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._slices: OrderedDict[tuple[str, Runs], Narrowed] = OrderedDict()
        self._seen: OrderedDict[tuple[str, Runs], None] = OrderedDict()

    def get(self, linear: BoundLinear, lanes: Runs, keep: bool = False) -> Narrowed:
        """The linear narrowed to lanes.

        Args:
            linear: what to narrow.
            lanes: kept lanes as intervals.
            keep: copy at once, because the plan is known to come again.
        """
        key = (linear.path, lanes)
        found = self._slices.get(key)
        if found is not None and found.source == _state(linear.parameter):
            self._slices.move_to_end(key)
            return found
        runs = linear.runs(lanes)
        if len(runs) < 2:
            return _narrow(linear, runs, copy=False)
        if not (keep or key in self._seen):
            self._seen[key] = None
            if len(self._seen) > self.REMEMBERED:
                self._seen.popitem(last=False)
            return _narrow(linear, runs, copy=False)
        self._drop(key)
        narrowed = _narrow(linear, runs, copy=True)
        self._slices[key] = narrowed
        self.bytes += _bytes(narrowed)
        while self.bytes > self.limit_bytes:
            self._drop(next(iter(self._slices)))
        return narrowed

    def clear(self) -> None:
        """Forget everything."""
        self._slices.clear()
        self._seen.clear()
        self.bytes = 0

    def _drop(self, key: tuple[str, Runs]) -> None:
        narrowed = self._slices.pop(key, None)
        if narrowed is not None:
            self.bytes -= _bytes(narrowed)


def _bytes(narrowed: Narrowed) -> int:
    return sum(weight.nbytes for weight in narrowed.weights)


class LinearForward:
    """Stands in for one linear's ``forward``; `active` None is the base model."""

    def __init__(self, module: nn.Module) -> None:
        self.stock: Any = module.forward
        self.active: Narrowed | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Shape (..., in features) to (..., out features), narrowed as `active` says."""
        return self.stock(features) if self.active is None else self.active(features)
