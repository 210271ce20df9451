"""Products: what linears, MLP blocks and attention compute with under a plan.

A linear multiplies with *runs* of kept features, straight from the stored weight, one product a
run. What is off is neither read nor multiplied, and nothing is copied, so the plan follows the
weights whichever way they change, and gradients reach them.

Models that are *frozen* trade that for 5 to 15 % of a product's time: weights are promised to stay
as they are, and the kept features of plans that run again are copied together, one product for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from typing_extensions import override

from planner.ir.intervals import Intervals, count_of
from planner.kernels.choice import Kernels
from planner.kernels.ops.kept_linear import kept_linear, suits
from planner.models.running.bindings import BoundLinear, BoundSite
from planner.models.running.patches import Shadow
from planner.models.running.run_products import product_of_runs, together


class Product(ABC):
    """Computes features of shape (..., in features) to (..., out features), either narrowed."""

    def refresh(self) -> None:  # noqa: B027 - most look at their weights as they multiply
        """Before a pass: look what weights are now."""

    @abstractmethod
    def __call__(self, features: Tensor) -> Tensor:
        """Multiply."""


class BlockForward(Shadow):
    """Stands in for a linear or a whole MLP block; `active` None is the module's own code."""

    def __init__(self, narrows: bool) -> None:
        self.narrows = narrows
        self.active: Product | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """As `Product`."""
        return self.stock(features) if self.active is None else self.active(features)


class Products:
    """What the modules of one model compute with, here by PyTorch and oneDNN.

    Args:
        frozen_bytes: bound on copies of kept features; 0 copies nothing, so that weights may change
            in any way. The oldest leave first.
        kernels: what was asked for; token stages, which are no module, ask this.
    """

    # Path of a sink -> mean of its input features, where products make up for those that are off.
    means: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, frozen_bytes: int = 0, kernels: Kernels = Kernels.TORCH) -> None:
        self.frozen_bytes, self.kernels = frozen_bytes, kernels
        self.copies = Copies(frozen_bytes) if frozen_bytes else None

    def linear(self, linear: BoundLinear, lanes: Intervals | None) -> Product | None:
        """What a linear of a site computes with, None for its own code; all lanes where None is."""
        if lanes is not None:
            return KeptProduct(linear, lanes, self.copies)
        module = linear.module
        is_plain = type(module).forward is nn.Linear.forward and suits(linear.parameter)
        return _Whole(module) if is_plain else None

    def mlp(self, site: BoundSite, lanes: Intervals | None) -> Product | None:
        """What a whole MLP block computes with; None to go linear by linear."""
        return None

    def attention(self, site: BoundSite) -> str | None:
        """Which of transformers' attention functions a block calls; None for the configured one."""
        return None


@dataclass(frozen=True, eq=False)
class _Whole(Product):
    """All of a weight, multiplied as narrowed ones are."""

    module: nn.Module

    @override
    def __call__(self, features: Tensor) -> Tensor:
        module: Any = self.module
        return kept_linear(features, module.weight, module.bias)


class KeptProduct(Product):
    """A linear that computes with some of its lanes, in ascending order.

    Kept features may be copied together in `copies`; None where they never are.
    """

    def __init__(self, linear: BoundLinear, lanes: Intervals, copies: Copies | None = None) -> None:
        self.linear, self.lanes = linear, lanes
        self.runs = linear.runs(lanes) or ((0, 0),)
        # Rows that lie together are fast as they are.
        is_view = len(self.runs) == 1 and linear.axis == "out"
        self.copies = None if is_view or not count_of(self.runs) else copies
        # Not held here: there may be many products, and copies have a bound.
        self._copy: Callable[[], _Copy | None] = lambda: None

    @override
    def refresh(self) -> None:
        if self.copies is None:
            return
        copy, linear = self._copy(), self.linear
        if copy is not None and copy.is_of(linear):
            return
        # Where a hook or a parametrisation computes the weight, it does so in the pass.
        if isinstance(linear.parameter, nn.Parameter):
            copy = self.copies.get(linear, self.lanes, self.runs)
        else:
            copy = None
        self._copy = (lambda: None) if copy is None else ref(copy)

    @override
    def __call__(self, features: Tensor) -> Tensor:
        copy, linear = self._copy(), self.linear
        # A copy is a constant to autograd.
        if copy is None or (torch.is_grad_enabled() and linear.parameter.requires_grad):
            return product_of_runs(features, linear.weight, linear.bias, linear.dim, self.runs)
        return kept_linear(features, copy.weight, copy.bias)


@dataclass(frozen=True, eq=False)
class _Copy:
    """Kept features copied together; parameters, which torch.compile may freeze."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    sources: tuple[_Source, _Source]

    def is_of(self, linear: BoundLinear) -> bool:
        """Whether the linear is as it was."""
        weight, bias = self.sources
        return weight.is_now(linear.parameter) and bias.is_now(linear.bias)


class Copies:
    """Kept features of frozen weights, copied together for plans that run again.

    A plan computes with runs when it runs for the first time. A copy is used as long as its weight
    is the same tensor, in the same place, and no operation of PyTorch wrote to it; what writes past
    PyTorch (numpy, ``.data``) is not seen. All copies together keep within `limit_bytes`.
    """

    # Of how many lanes it is remembered that they ran.
    REMEMBERED = 4096

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._held: OrderedDict[tuple[str, Intervals], _Copy] = OrderedDict()
        self._ran: OrderedDict[tuple[str, Intervals], None] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are of one model's weights."""
        return Copies, (self.limit_bytes,)

    def get(self, linear: BoundLinear, lanes: Intervals, runs: Intervals) -> _Copy | None:
        """A copy of a linear's kept features as they are now; None to compute with runs."""
        key = (linear.path, lanes)
        held = self._held.get(key)
        if held is not None and held.is_of(linear):
            return held
        self._drop(key)
        weight = linear.weight
        size = weight.numel() // linear.features * count_of(runs) * weight.itemsize
        # Columns that lie together are fast as they are, where `F.linear` multiplies.
        if (len(runs) == 1 and not suits(weight)) or size > self.limit_bytes:
            return None
        if key not in self._ran:
            self._ran[key] = None
            if len(self._ran) > self.REMEMBERED:
                self._ran.popitem(last=False)
            return None
        copy = self._held[key] = _copied(linear, runs)
        self.bytes += copy.weight.nbytes
        while self.bytes > self.limit_bytes:
            self._drop(next(iter(self._held)))
        return copy

    def _drop(self, key: tuple[str, Intervals]) -> None:
        copy = self._held.pop(key, None)
        if copy is not None:
            self.bytes -= copy.weight.nbytes


# Copies outlive the call that makes them, so they must not be inference tensors.
@torch.inference_mode(False)
@torch.no_grad()
def _copied(linear: BoundLinear, runs: Intervals) -> _Copy:
    bias = linear.bias
    sources = _Source(linear.parameter), _Source(bias)
    kept = together(linear.weight.detach(), linear.dim, runs).contiguous()
    if bias is not None:
        pieces = together(bias, 0, runs) if linear.axis == "out" else bias
        bias = nn.Parameter(pieces.clone(), requires_grad=False)
    return _Copy(nn.Parameter(kept, requires_grad=False), cast(Any, bias), sources)


class _Source:
    """A parameter as it was when it was copied, None where there was none.

    Its memory is kept: were it freed, another state of the parameter could come to lie there.
    """

    def __init__(self, parameter: Tensor | None) -> None:
        self.parameter = parameter
        self.memory = None if parameter is None else parameter.detach()
        self.state = _state(parameter)

    def is_now(self, parameter: Tensor | None) -> bool:
        """Whether PyTorch has not replaced, moved, converted or written to it."""
        return parameter is self.parameter and _state(parameter) == self.state


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    if tensor is None:
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode, for a block."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def is_close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results of one computation differ by rounding alone."""
    if found.shape != wanted.shape:
        return False
    error = (found.double() - wanted.double()).norm()
    return bool(error <= torch.finfo(wanted.dtype).eps ** 0.5 * wanted.double().norm())
