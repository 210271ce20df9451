"""Blocks of a captured graph: where a site of the Graph stands in it, and whether ops can run it.

The site says which modules' weights belong to it and how lanes lie in them; all that is read off
the captured graph is what happens between those products. Nothing here changes the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from planner.ir.lowering.aten import ATTENTION, VIEWS, opname, upstream
from planner.kernels.ops.project_rows import ACTIVATIONS
from planner.models.running.bindings import BoundLinear, BoundSite


class Unmatched(Exception):
    """A block that planner's ops cannot run; the message says why."""


@dataclass(frozen=True)
class Product:
    """One linear of a site in the captured graph: `node` computes ``x @ weight.T + bias``."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    bound: BoundLinear  # the site's view of it


@dataclass(frozen=True)
class Mlp:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``."""

    x: fx.Node
    up: tuple[Product, slice]  # the product it comes from, and its rows there
    gate: tuple[Product, slice] | None
    activation: str  # a key of `planner.kernels.ops.project_rows.ACTIVATIONS`
    inner: tuple[fx.Node, ...]  # between the products, in order, which the op replaces


@dataclass(frozen=True)
class Attention:
    """Projections, attention, and the output projection; what stock code does between stays."""

    # With the pieces of rows that are each divided evenly among KV groups.
    projections: tuple[tuple[Product, tuple[slice, ...]], ...]
    query: fx.Node  # (batch, heads, tokens, features), as are keys and values
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float  # factor on the scores
    causal: bool  # whether each query sees the keys up to its own place
    inner: tuple[fx.Node, ...]  # from the attention to the output projection; the op replaces them


def value_of(node: object) -> Any:
    """What a node was captured with: a fake tensor, a number, or None."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


class Linears:
    """Products with a model's own weights in a captured graph."""

    def __init__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        nodes = list(graph_module.graph.nodes)
        self._entering = [node for node in nodes if node.op == "placeholder"]
        self._readers: dict[int, fx.Node] = {
            id(value): node for node, value in zip(self._entering, example_inputs, strict=True)
        }
        for node in nodes:
            if node.op == "get_attr" and isinstance(node.target, str):
                path, _, name = node.target.rpartition(".")
                owner = graph_module.get_submodule(path)
                self._readers[id(getattr(owner, name, None))] = node
        self._made = _made_weights(nodes)

    def holds(self, bound: BoundLinear) -> bool:
        """Whether the graph reads a linear's weight, or what that is made of."""
        return any(reader.users for reader in self._reading(bound))

    def find(self, bound: BoundLinear) -> Product | None:
        """The one product with a linear's weight, None where the graph has none or several."""
        reading = self._reading(bound)
        weight = reading[0] if reading else None
        if "weight" not in bound.module._parameters:
            made = [node for node, of in self._made.items() if of & {*reading}]
            weight = made[0] if len(made) == 1 else None
        # A weight that is computed anew is kept in its module, and so leaves the graph as well.
        users = [user for user in weight.users if user.op != "output"] if weight else []
        if weight is None or len(users) != 1:
            return None
        (node,) = users
        given = _arguments(node, ("input", "weight", "bias"))
        x, bias = given.get("input"), given.get("bias")
        if opname(node) != "linear" or given["weight"] is not weight or not isinstance(x, fx.Node):
            return None
        return Product(node, x, weight, bias if isinstance(bias, fx.Node) else None, bound)

    def place_of(self, bound: BoundLinear) -> int | None:
        """Where among the graph's inputs a linear's weight is kept; None where it is none."""
        reading = self._reading(bound)
        return (
            self._entering.index(reading[0])
            if reading[:1] and reading[0] in self._entering
            else None
        )

    def _reading(self, bound: BoundLinear) -> list[fx.Node]:
        """Nodes that read what a linear's weight is kept as."""
        found = (self._readers.get(id(tensor)) for tensor in bound.stored)
        return [node for node in found if node is not None]


def _made_weights(nodes: Sequence[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """Weights of a graph's products, each with the tensors that it is computed from."""
    made = {}
    for node in nodes:
        weight = _arguments(node, ("input", "weight")).get("weight")
        if opname(node) == "linear" and isinstance(weight, fx.Node):
            of = upstream(weight, lambda _: True)
            made[weight] = {n for n in of if n.op in ("placeholder", "get_attr")}
    return made


def match_mlp(site: BoundSite, sink: Product, linears: Linears) -> Mlp:
    """The MLP that ends in `sink`; Unmatched if ``planner::project_rows`` does not compute it."""
    sources = _sources(site, linears)
    if len({source.x for source in sources}) != 1:
        raise Unmatched("its products read different inputs")
    neurons = site.site.lanes
    rows = [(source, piece) for source in sources for piece in _pieces(source.bound, neurons)]
    if len(rows) > 2 or any(piece.stop - piece.start != neurons for _, piece in rows):
        raise Unmatched("its rows are not one neuron each")
    inner = _between([source.node for source in sources], sink)
    activation, gate = _activation(rows, inner, sink.x)
    up = next(row for row in rows if row is not gate)
    return Mlp(sources[0].x, up, gate, activation, inner)


def match_attention(site: BoundSite, sink: Product, linears: Linears) -> Attention:
    """The attention that ends in `sink`; Unmatched if ``planner::attend`` does not compute it."""
    attention, inner = _behind(sink)
    given = _arguments(attention, _SDPA)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    mask, scale = given.get("attn_mask"), given.get("scale")
    if given.get("dropout_p", 0.0) != 0.0 or not isinstance(given.get("is_causal", False), bool):
        raise Unmatched("it drops weights, or its causality is not known")
    if not all(isinstance(node, fx.Node) for node in (query, key, value)):
        raise Unmatched("its operands are no activations")
    key, value = _unrepeated(key), _unrepeated(value)
    lanes = site.site.lanes
    counts = [int(value_of(node).shape[1]) for node in (query, key, value)]
    if any(count % lanes for count in counts) or counts[1] != counts[2] or counts[0] % counts[1]:
        raise Unmatched("its heads are no whole multiple of its KV groups")
    columns = counts[0] * int(value_of(value).shape[-1])
    if [(p.start, p.stop) for p in _pieces(sink.bound, lanes)] != [(0, columns)]:
        raise Unmatched("the columns of its output projection are not in the order of the heads")
    projections = [(p, tuple(_pieces(p.bound, lanes))) for p in _sources(site, linears)]
    number = value_of(scale)
    return Attention(
        tuple(projections),
        query,
        key,
        value,
        mask if isinstance(mask, fx.Node) else None,
        float(number) if number is not None else value_of(query).shape[-1] ** -0.5,
        bool(given.get("is_causal", False)),
        inner,
    )


# -- what lies between products -------------------------------------------------------------------

_SDPA = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
)  # fmt: skip


def _arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """Arguments by name, whichever way they are given."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _sources(site: BoundSite, linears: Linears) -> list[Product]:
    """The products whose rows belong to lanes."""
    found = []
    for bound in site.linears:
        if bound.binding.axis == "out":
            product = linears.find(bound)
            if product is None:
                raise Unmatched(f"{bound.path} is not one plain product")
            found.append(product)
    return found


def _pieces(bound: BoundLinear, lanes: int) -> list[slice]:
    """Consecutive features of a linear, each piece divided evenly among all lanes in order."""
    pieces: list[slice] = []
    for block in sorted(bound.binding.blocks, key=lambda block: block.offset):
        start = pieces[-1].stop if pieces else 0
        if block.offset != start or block.stride != block.width:
            raise Unmatched(f"the features of {bound.path} are not in the order of the lanes")
        pieces.append(slice(start, start + lanes * block.width))
    if not pieces or pieces[-1].stop != bound.features:
        raise Unmatched(f"{bound.path} has features that belong to no lane")
    return pieces


def _between(sources: Sequence[fx.Node], sink: Product) -> tuple[fx.Node, ...]:
    """Nodes from some products to the input of another, which nothing else reads or feeds."""
    inner = upstream(sink.x, lambda node: node not in sources).keys() - set(sources)
    if any(node.op not in ("call_function", "call_method") for node in inner):
        raise Unmatched("its neurons meet values that are none of its own")
    allowed = inner | {sink.node}
    if any(user not in allowed for node in (*sources, *inner) for user in node.users):
        raise Unmatched("its neurons are read elsewhere too")
    return tuple(node for node in sink.node.graph.nodes if node in inner)


def _behind(sink: Product) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The attention that a projection reads through views, and all nodes up to the projection."""
    node, chain = sink.x, [sink.x]
    while opname(node) in VIEWS and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        chain.append(node)
    if opname(node) not in ATTENTION:
        raise Unmatched(f"its output projection reads no fused attention but {opname(node)}")
    if any(len(inner.users) != 1 for inner in chain):
        raise Unmatched("its output is read elsewhere too")
    return node, tuple(reversed(chain))


def _unrepeated(node: fx.Node) -> fx.Node:
    """Keys or values before each head was repeated for the queries that share it.

    transformers does so as ``x[:, :, None].expand(...).reshape(...)``.
    """
    chain = [node]
    while len(chain) < 4 and chain[-1].args and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    names = [opname(link) for link in chain[:3]]
    if len(chain) < 4 or names not in (
        ["reshape", "expand", "getitem"],
        ["reshape", "expand", "unsqueeze"],
    ):
        return node
    repeated, spread, single, base = (tuple(value_of(link).shape) for link in chain)
    same = base[:2] + base[2:] == single[:2] + single[3:] and single[2:3] == (1,)
    copies = spread[:2] == base[:2] and spread[3:] == base[2:] and len(base) == 4
    if same and copies and repeated[1] == base[1] * spread[2] and repeated[2:] == base[2:]:
        return chain[-1]
    return node


def _activation(
    rows: Sequence[tuple[Product, slice]], inner: Sequence[fx.Node], end: fx.Node
) -> tuple[str, tuple[Product, slice] | None]:
    """Which activation the nodes compute, and which rows are its gate; found by trying them.

    Activations are written in many ways; what a few random numbers become is the same.
    """
    generator = torch.Generator().manual_seed(0)
    with unset_fake_temporarily(), torch.no_grad():
        values = {
            product.node: torch.randn(1, 1, product.bound.features, generator=generator)
            for product, _ in rows
        }
        got = _evaluated(inner, values, end)
        pieces = [values[product.node][..., piece] for product, piece in rows]
        for name, function in ACTIVATIONS.items():
            if len(rows) == 1 and _agree(got, function(pieces[0])):
                return name, None
            for gate, up in ((0, 1), (1, 0)) if len(rows) == 2 else ():
                if _agree(got, function(pieces[gate]) * pieces[up]):
                    return name, rows[gate]
    raise Unmatched("its activation is none that the kernels have")


def _agree(got: Tensor | None, expected: Tensor) -> bool:
    fits = got is not None and got.shape == expected.shape
    return fits and torch.allclose(got, expected, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def _evaluated(
    nodes: Sequence[fx.Node], values: Mapping[fx.Node, Tensor], end: fx.Node
) -> Tensor | None:
    """What the nodes make of some values; None where sizes are written into them."""
    known: dict[fx.Node, Any] = dict(values)
    try:
        for node in nodes:
            args = fx.map_arg(node.args, known.__getitem__)
            kwargs = fx.map_arg(node.kwargs, known.__getitem__)
            if node.op == "call_method":
                known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    except (KeyError, RuntimeError, TypeError, ValueError, IndexError):
        return None
    found = known.get(end)
    return found if isinstance(found, Tensor) else None
