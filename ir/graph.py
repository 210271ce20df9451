"""The Graph: operators, edges, and the sites that can be narrowed.

A Graph is independent of weights and of token counts. `Operator` and `Site` are small immutable
records; networkx holds the edges and does the traversals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx as nx

from planner.ir.dims import Dim, Sizes, product
from planner.ir.intervals import Intervals, merged

PARTS = ("vision", "projector", "decoder", "head")
SITE_KINDS = ("layer", "heads", "mlp")

Value = int | str | Dim


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator of the graph."""

    name: str
    kind: str  # name of its record in `planner.ir.kinds`
    inputs: tuple[str, ...] = ()  # names of the operators whose outputs this one reads, in order
    shape: tuple[Dim, ...] = ()  # of the output, symbolic, batch first
    module: str = ""  # path of the stock model's module that computes it ("" for none)
    part: str = "decoder"  # one of `PARTS`
    # Index of the decoder (or vision) layer it belongs to, None outside the stack.
    layer: int | None = None
    attributes: tuple[tuple[str, Value], ...] = ()  # those of the kind's record, sorted by name
    # Pairs (attribute or ``shape.i``, site name): that quantity shrinks in proportion to the lanes
    # the site keeps.
    narrowed_by: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, attribute: str) -> Value:
        value: Value | None = self.get(attribute)
        if value is None:
            raise KeyError(f"operator {self.name} has no attribute {attribute}")
        return value

    def get(self, attribute: str, default: Any = None) -> Any:
        """The attribute's value, or the default where it is absent."""
        for name, value in self.attributes:
            if name == attribute:
                return value
        return default

    def integer(self, attribute: str) -> int:
        """The attribute's value, which must be an integer."""
        value = self[attribute]
        if not isinstance(value, int):
            raise TypeError(f"attribute {attribute} of {self.name} is {value!r}, not an integer")
        return value

    def elements(self, sizes: Sizes) -> int:
        """Elements of the output at the given sizes of the symbols."""
        return product(self.shape, sizes)

    def rows(self, sizes: Sizes) -> int:
        """Rows of the output: elements of all dimensions but the last."""
        return product(self.shape[:-1], sizes)

    def having(self, **attributes: Value) -> Operator:
        """A copy with attributes set."""
        merged = dict(self.attributes) | attributes
        return replace(self, attributes=tuple(sorted(merged.items())))


@dataclass(frozen=True, slots=True)
class Block:
    """Features of lane l: ``offset + l*stride`` to ``offset + l*stride + width``."""

    offset: int
    stride: int
    width: int


@dataclass(frozen=True, slots=True)
class Binding:
    """Which features of one module's weight belong to which lane of a site.

    `axis` is ``out`` (rows of a Linear's weight, and its bias) or ``in`` (columns).
    """

    module: str
    axis: str
    blocks: tuple[Block, ...]

    def features(self, lanes: Intervals) -> Intervals:
        """The features of some lanes."""
        found: list[tuple[int, int]] = []
        for block in self.blocks:
            for start, stop in lanes:
                first, last = (block.offset + lane * block.stride for lane in (start, stop))
                if block.width == block.stride:
                    found.append((first, last))
                else:
                    found.extend((f, f + block.width) for f in range(first, last, block.stride))
        return merged(found)


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the graph that can be narrowed."""

    name: str  # ``layer.5``, ``heads.5``, ``mlp.5``
    kind: str  # one of `SITE_KINDS`
    layer: int  # of the decoder
    module: str = ""  # path of the layer, attention block or MLP
    lanes: int = 1  # indivisible units that the weights have: KV groups, neurons, 1 for a layer
    switches: int = 1  # into how many switches the lanes are divided
    bindings: tuple[Binding, ...] = ()  # where the lanes lie in the weights

    @property
    def bounds(self) -> tuple[int, ...]:
        """Lane boundaries of the switches: switch u covers lanes ``bounds[u]`` to ``bounds[u+1]``.

        Where lanes do not divide evenly the first switches are one lane wider (13824 neurons in
        40 switches: 24 of 346, then 16 of 345).
        """
        width, wider = divmod(self.lanes, self.switches)
        bounds = [0]
        for index in range(self.switches):
            bounds.append(bounds[-1] + width + (index < wider))
        return tuple(bounds)


@dataclass(frozen=True)
class Graph:
    """Operators in an order where every input precedes its reader, and sites in layer order."""

    name: str  # what the user called the model
    operators: tuple[Operator, ...]
    sites: tuple[Site, ...] = ()
    # Facts about the model that costs and plans need: ``model_type``, ``hidden_size``,
    # ``decoder_layers``, ``image_tokens`` (per run of the vision encoder), ``fingerprint``,
    # ``dtype_bytes``.
    properties: Mapping[str, int | str] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Operator]:
        """Operators by name."""
        return {operator.name: operator for operator in self.operators}

    @cached_property
    def sites_by_name(self) -> dict[str, Site]:
        """Sites by name."""
        return {site.name: site for site in self.sites}

    @cached_property
    def network(self) -> nx.DiGraph[str]:
        """The edges, for traversals."""
        network: nx.DiGraph[str] = nx.DiGraph()
        network.add_nodes_from(self.by_name)
        for operator in self.operators:
            network.add_edges_from((source, operator.name) for source in operator.inputs)
        return network

    def __iter__(self) -> Iterator[Operator]:
        return iter(self.operators)

    def sites_of(self, kind: str) -> tuple[Site, ...]:
        """Sites of one kind, in layer order."""
        return tuple(site for site in self.sites if site.kind == kind)

    def sites_at(self, layer: int) -> list[Site]:
        """Sites of one decoder layer."""
        return [site for site in self.sites if site.layer == layer]

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.properties["decoder_layers"])

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return int(self.properties.get("dtype_bytes", 2))

    def replacing(
        self, operators: Iterable[Operator], sites: Iterable[Site] | None = None
    ) -> Graph:
        """A copy with other operators (and sites)."""
        sites = self.sites if sites is None else tuple(sites)
        return replace(self, operators=tuple(operators), sites=sites)
