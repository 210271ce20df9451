"""Narrow tokens: fewer image tokens from some decoder layer on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Operator
from planner.ir.structure import redirected


class TokenStage(Protocol):
    """A choice of image tokens before a decoder layer."""

    @property
    def layer(self) -> int:
        """The first layer that sees the smaller set."""

    @property
    def keep(self) -> int:
        """Image tokens kept, per sample."""

    @property
    def of(self) -> int:
        """Image tokens of a sample before any stage."""


@dataclass(frozen=True)
class NarrowTokens:
    """Select tokens before some decoder layers, and count the tokens after them apart.

    After a stage at layer k token counts are called ``query.k`` and ``context.k``, so that one
    graph prices every keep count (`planner.ir.cost.Workload.prefill`).
    """

    stages: tuple[TokenStage, ...]  # in layer order, each keeping fewer tokens than the one before
    # Layers of those whose tokens are scored by a row of attention, which costs a product of its
    # own.
    scored: frozenset[int] = frozenset()
    name: ClassVar[str] = "narrow-tokens"

    def apply(self, graph: Graph) -> Graph:
        """The graph with ``select_tokens`` operators and renamed token counts.

        InputError where stages are out of order or lie behind the last layer.
        """
        self._check(graph)
        for stage in self.stages:
            graph = _narrow(graph, stage, stage.layer in self.scored)
        return graph

    def _check(self, graph: Graph) -> None:
        layer, keep = -1, None
        for stage in self.stages:
            if not layer < stage.layer < graph.layers:
                raise InputError(
                    f"token stages must be at ascending layers below {graph.layers}, "
                    f"not at {stage.layer}"
                )
            if not 0 <= stage.keep <= (stage.of if keep is None else keep):
                raise InputError(
                    f"the token stage at layer {stage.layer} cannot keep {stage.keep} of "
                    f"{stage.of if keep is None else keep} image tokens"
                )
            layer, keep = stage.layer, stage.keep


def _boundary(graph: Graph, layer: int) -> int:
    """Position of the first operator that runs after a stage at `layer`.

    That layer itself may have been left out; then the next one that runs, or what follows the
    last layer, takes its place.
    """
    stacks = {site.module.rpartition(".")[0] + "." for site in graph.sites_of("layer")}
    numbered = [
        (position, operator.layer)
        for position, operator in enumerate(graph)
        if operator.part == "decoder"
        and operator.layer is not None
        and (not stacks or any(operator.module.startswith(stack) for stack in stacks))
    ]
    if not numbered:
        # All layers are left out: only what follows them is left, the norm before lm_head.
        return max(i for i, o in enumerate(graph) if o.part == "decoder" and o.kind != "input")
    later = (position for position, number in numbered if number >= layer)
    boundary = next(later, numbered[-1][0] + 1)
    # Where no layer runs between two stages the later one comes second all the same.
    while boundary < len(graph.operators) and graph.operators[boundary].kind == "select_tokens":
        boundary += 1
    return boundary


def _counts(operator: Operator) -> list[str]:
    """The symbols of token counts in an operator's shape."""
    symbols = {symbol for dim in operator.shape for symbol in dim.symbols}
    return sorted(s for s in symbols if s.partition(".")[0] == "query")


def _narrow(graph: Graph, stage: TokenStage, is_scored: bool) -> Graph:
    boundary = _boundary(graph, stage.layer)
    before, after = graph.operators[:boundary], graph.operators[boundary:]
    known = {operator.name: operator for operator in before if operator.part == "decoder"}
    read = dict.fromkeys(name for operator in after for name in operator.inputs)
    crossing = [known[name] for name in read if name in known and _counts(known[name])]
    names = {
        count: f"{count.partition('.')[0]}.{stage.layer}"
        for operator in crossing
        for query in _counts(operator)
        for count in (query, query.replace("query", "context"))
    }
    selected: list[Operator] = []
    for index, operator in enumerate(crossing):
        name = f"tokens.{stage.layer}" + (f"_{index}" if index else "")
        chosen = Operator(name, "select_tokens", (operator.name,), operator.shape, "", "decoder")
        chosen = chosen.having(keep=stage.keep, of=stage.of)
        chosen = _renamed(replace(chosen, layer=stage.layer), names)
        # One choice serves all values that cross: it is scored once, where the first is gathered.
        width = _score_width(before) if is_scored and not index else 0
        selected.append(chosen.having(before=_tokens(operator), score_width=width))
    sources = {o.name: chosen.name for o, chosen in zip(crossing, selected, strict=True)}
    rest = [_renamed(o, names) if o.part == "decoder" else o for o in redirected(after, sources)]
    return graph.replacing([*before, *selected, *rest])


def _tokens(operator: Operator) -> Dim:
    """The dimension of an operator's shape that counts tokens."""
    return next(d for d in operator.shape if any(s.startswith("query") for s in d.symbols))


def _score_width(before: Sequence[Operator]) -> int:
    """Query features that score the tokens: of the last attention that runs before the stage."""
    for operator in reversed(before):
        if operator.kind == "attention" and operator.part == "decoder":
            return operator.integer("heads") * operator.integer("head_dim")
    return 0


def _renamed(operator: Operator, names: Mapping[str, str]) -> Operator:
    return replace(
        operator,
        shape=tuple(dim.rename(names) for dim in operator.shape),
        attributes=tuple(
            (key, value.rename(names) if isinstance(value, Dim) else value)
            for key, value in operator.attributes
        ),
    )
