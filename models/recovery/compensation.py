"""Mean compensation: what is off says what it says on average.

A site's sink adds, for the features that a plan leaves out, their product with the features' mean
over calibration samples: one vector a plan, so it holds for plans that change from input to input
(FLAP, arXiv 2312.11983, section 3.3). Blocks of attention that keep no head at all add nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from planner.ir.errors import InputError
from planner.ir.intervals import Intervals
from planner.models.recovery.moments import narrowable
from planner.models.running.bindings import BoundLayer, BoundLinear, BoundSite
from planner.models.running.products import Product, Products


class CompensatedProducts(Products):
    """Products whose sinks make up for what they lack.

    `products`: what they are made of. `means`: path of a sink -> mean of its input features, shape
    (features,).
    """

    def __init__(self, products: Products, means: Mapping[str, Tensor]) -> None:
        super().__init__(products.frozen_bytes, products.kernels)
        self.products, self.means = products, means

    @override
    def linear(self, linear: BoundLinear, lanes: Intervals | None) -> Product | None:
        return self._compensated(self.products.linear(linear, lanes), linear, lanes)

    @override
    def mlp(self, site: BoundSite, lanes: Intervals | None) -> Product | None:
        return self._compensated(self.products.mlp(site, lanes), site.sink, lanes)

    @override
    def attention(self, site: BoundSite) -> str | None:
        return self.products.attention(site)

    def _compensated(
        self, product: Product | None, linear: BoundLinear, lanes: Intervals | None
    ) -> Product | None:
        if product is None or lanes is None or linear.path not in self.means:
            return product
        return _Compensated(product, linear, lanes, self.means[linear.path])


def compensated(
    products: Products, layers: Sequence[BoundLayer], means: Mapping[str, Tensor]
) -> CompensatedProducts:
    """Products that make up for what is off.

    Args:
        products: what they are made of.
        layers: of the model.
        means: path of each sink -> mean of its input features, shape (features,).

    Raises InputError: a sink has no mean, or one of another model.
    """
    for sink in (site.sink for site in narrowable(layers)):
        mean = means.get(sink.path)
        if mean is None or mean.shape != (sink.features,) or not torch.isfinite(mean).all():
            raise InputError(f"the means are of another model: none fits '{sink.path}'")
    return CompensatedProducts(products, means)


class _Compensated(Product):
    """A product with a vector added, which follows the weight."""

    def __init__(self, product: Product, sink: BoundLinear, lanes: Intervals, mean: Tensor) -> None:
        self.product, self.sink = product, sink
        self.missing = mean.clone()
        for start, stop in sink.runs(lanes):
            self.missing[start:stop] = 0
        self._known: tuple[Tensor, int, Tensor] | None = None

    @override
    def refresh(self) -> None:
        self.product.refresh()

    @override
    def __call__(self, features: Tensor) -> Tensor:
        result = self.product(features)
        return result + self._vector().to(result.dtype)

    def _vector(self) -> Tensor:
        """Shape (out features,)."""
        weight = self.sink.parameter
        # Weights of inference mode do not tell when they change.
        if weight.is_inference() or (torch.is_grad_enabled() and weight.requires_grad):
            return self.sink.weight @ self.missing.to(weight)
        known = self._known
        if known is None or known[0] is not weight or known[1] != weight._version:
            vector = self.sink.weight.detach() @ self.missing.to(weight)
            known = self._known = (weight, weight._version, vector)
        return known[2]
