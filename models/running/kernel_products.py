"""Products by planner's kernels: linears, MLP blocks and attention on stock weights in place.

Nothing is copied: kernels read the rows and columns of a weight that a plan keeps, so weights may
change in any way, and gradients reach them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.intervals import Intervals, count_of
from planner.kernels.choice import (
    Kernels,
    has_triton,
    linear_product,
    mlp_is_faster,
    product_is_faster,
)
from planner.kernels.mlp_blocks import MLPBlock, NotFusable, mlp_block, unit_width
from planner.kernels.ops.project_columns import ProjectColumns
from planner.kernels.ops.project_rows import ACTIVATIONS, ProjectRows
from planner.kernels.survivors import Survivors, neuron_width
from planner.models.running.attention_calls import KERNEL_ATTENTION
from planner.models.running.bindings import BoundLinear, BoundSite
from planner.models.running.products import Product, Products, evaluating, is_close

_log = logging.getLogger("planner")
# Code that multiplies and does nothing else.
_PLAIN = (nn.Linear.forward, Conv1D.forward)


def products_of(graph: Graph, kernels: Kernels, frozen_bytes: int) -> Products:
    """What a model computes with, as the user chose; ``auto`` is PyTorch where there is no GPU."""
    without = kernels is Kernels.AUTO and not (has_triton() and torch.cuda.is_available())
    if without or kernels is Kernels.TORCH:
        return Products(frozen_bytes, kernels)
    return KernelProducts(graph, kernels, frozen_bytes)


class KernelProducts(Products):
    """Products by Triton; under ``auto`` by whoever is faster, decided at every call.

    The graph says what the model's MLP blocks are made of.
    """

    def __init__(self, graph: Graph, kernels: Kernels, frozen_bytes: int = 0) -> None:
        super().__init__(frozen_bytes, kernels)
        self.graph = graph
        self._blocks: dict[str, MLPBlock | None] = {}

    @override
    def linear(self, linear: BoundLinear, lanes: Intervals | None) -> Product | None:
        stock = super().linear(linear, lanes)
        if lanes is None and type(linear.module).forward not in _PLAIN:
            return stock
        return LinearByKernel(linear, lanes, self.kernels, stock)

    @override
    def mlp(self, site: BoundSite, lanes: Intervals | None) -> Product | None:
        name = site.site.name
        if any(_has_hooks(linear) for linear in site.linears):
            return None
        if name not in self._blocks:
            self._blocks[name] = self._block(site)
        block = self._blocks[name]
        return None if block is None else self._by_kernel(site, block, lanes)

    @override
    def attention(self, site: BoundSite) -> str | None:
        named = hasattr(getattr(site.module, "config", None), "_attn_implementation")
        return KERNEL_ATTENTION[self.kernels] if named else None

    def _block(self, site: BoundSite) -> MLPBlock | None:
        """What a site's block is made of, where it is no more than that: found out by trying."""
        every = ((0, site.site.lanes),)
        try:
            block = mlp_block(self.graph, site.site)
            if any(linear.runs(every) != every or linear.shared for linear in site.linears):
                raise NotFusable("its neurons are no single rows and columns")
            if not _agrees(site, self._by_kernel(site, block, None)):
                raise NotFusable("it computes more than its linears and their activation")
        except NotFusable as why:
            _log.info("%s runs linear by linear: %s", site.site.module, why)
            return None
        return block

    def _by_kernel(self, site: BoundSite, block: MLPBlock, lanes: Intervals | None) -> MLPByKernel:
        parts = {
            part.path: LinearByKernel(part, lanes, self.kernels, Products.linear(self, part, lanes))
            for part in site.linears
        }
        gate = None if block.gate is None else parts[block.gate.module]
        every = ((0, site.site.lanes),)
        return MLPByKernel(
            parts[block.up.module],
            parts[block.down.module],
            gate,
            block.activation,
            every if lanes is None else lanes,
            neuron_width(site.site.lanes),
            self.kernels,
        )


class LinearByKernel(Product):
    """A linear that computes with some of its lanes, or with all (None).

    `stock` is what PyTorch computes with; None for the module's own code.
    """

    def __init__(
        self, linear: BoundLinear, lanes: Intervals | None, kernels: Kernels, stock: Product | None
    ) -> None:
        self.linear, self.kernels, self.stock = linear, kernels, stock
        self.runs = ((0, linear.features),) if lanes is None else linear.runs(lanes)
        width = unit_width(linear.binding, linear.features)
        self._survivors = cache(partial(Survivors.packed, self.runs, width))

    @override
    def refresh(self) -> None:
        if self.stock is not None:
            self.stock.refresh()

    @override
    def __call__(self, features: Tensor) -> Tensor:
        linear = self.linear
        if self.kernels is Kernels.AUTO and not self._is_faster(features):
            stock = self.stock or partial(type(linear.module).forward, linear.module)
            return stock(features)
        weight, bias, survivors = linear.weight, linear.bias, self._survivors(features.device)
        op = ProjectRows if linear.axis == "out" else ProjectColumns
        return op(features, weight, bias, survivors).run(triton=True)

    def _is_faster(self, features: Tensor) -> bool:
        kept, (out, depth) = count_of(self.runs), self.linear.weight.shape
        columns, depth = (kept, depth) if self.linear.axis == "out" else (out, kept)
        product = linear_product(features, columns, depth)
        return kept > 0 and product_is_faster(product, max(len(self.runs), 1))


@dataclass(frozen=True, eq=False)
class MLPByKernel(Product):
    """An MLP block that computes with some of its neurons, `width` of which make a unit.

    Its linears may be computed one by one instead. `activation` is a key of
    `planner.kernels.ops.project_rows.ACTIVATIONS`.
    """

    up: LinearByKernel
    down: LinearByKernel
    gate: LinearByKernel | None
    activation: str
    neurons: Intervals
    width: int
    kernels: Kernels

    @override
    def refresh(self) -> None:
        for part in (self.up, self.down, self.gate):
            if part is not None:
                if _has_hooks(part.linear):
                    raise InputError(
                        f"{part.linear.path} has hooks since the plan was made, and its block runs "
                        "as one kernel: compile the model again, or with kernels='torch'"
                    )
                part.refresh()

    @cached_property
    def _survivors(self) -> Callable[[torch.device], Survivors]:
        return cache(partial(Survivors.packed, self.neurons, self.width))

    @override
    def __call__(self, hidden: Tensor, *, triton: bool = True) -> Tensor:
        if self.kernels is Kernels.AUTO and not self._is_faster(hidden):
            inner = self.up(hidden)
            act = ACTIVATIONS[self.activation]
            inner = act(inner) if self.gate is None else act(self.gate(hidden)) * inner
            return self.down(inner)
        up, down = self.up.linear, self.down.linear
        gate, gate_bias = None, None
        if self.gate is not None:
            gate, gate_bias = self.gate.linear.weight, self.gate.linear.bias
        survivors, further = self._survivors(hidden.device), (True, gate, gate_bias)
        neurons = ProjectRows(hidden, up.weight, up.bias, survivors, *further, self.activation)
        inner = neurons.run(triton=triton)
        return ProjectColumns(inner, down.weight, down.bias, survivors).run(triton=triton)

    def _is_faster(self, hidden: Tensor) -> bool:
        kept, parts = count_of(self.neurons), 1 + (self.gate is not None)
        product = linear_product(hidden, kept, hidden.shape[-1], parts)
        return kept > 0 and mlp_is_faster(product, max(len(self.neurons), 1))


def _has_hooks(linear: BoundLinear) -> bool:
    """Whether more happens when a linear is called than its product, such as a weight's norm."""
    module = linear.module
    return bool(module._forward_pre_hooks or module._forward_hooks)


@torch.no_grad()
def _agrees(site: BoundSite, block: MLPByKernel) -> bool:
    """Whether a block by PyTorch computes on a few tokens what the stock module does."""
    weight = block.up.linear.weight
    tokens = torch.randn(1, 3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(weight)
    with evaluating(site.module):
        try:
            wanted = site.module(tokens)
        except Exception:  # whatever it raises, it is not called with one tensor
            return False
    return isinstance(wanted, Tensor) and is_close(block(tokens, triton=False), wanted)
