"""Narrowing: an operator when a site keeps only some of its lanes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from planner.ir.dims import Dim
from planner.ir.graph import Operator, Value

__all__ = ["narrowed"]


def narrowed(operator: Operator, kept: Mapping[str, tuple[int, int]]) -> Operator:
    """The operator with every quantity that a site narrows scaled by kept lanes / all lanes.

    Args:
        operator: any operator.
        kept: site name -> (lanes kept, lanes); sites that are absent keep everything.

    Raises:
        ValueError: where a quantity is no multiple of the site's lanes.
    """
    shape = list(operator.shape)
    attributes: dict[str, Value] = dict(operator.attributes)
    for quantity, site in operator.narrowed_by:
        if site not in kept:
            continue
        some, lanes = kept[site]
        if quantity.startswith("shape."):
            position = int(quantity[6:])
            shape[position] = Dim(_scaled(operator, shape[position].constant, some, lanes))
        else:
            attributes[quantity] = _scaled(operator, operator.integer(quantity), some, lanes)
    return replace(operator, shape=tuple(shape), attributes=tuple(sorted(attributes.items())))


def _scaled(operator: Operator, value: int, some: int, lanes: int) -> int:
    if value % lanes:
        raise ValueError(f"{operator.name}: {value} is not a multiple of {lanes} lanes")
    return value // lanes * some
