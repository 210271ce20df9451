"""What there is to compile: the blocks that a plan leaves of a decoder, each shape once.

Enters: a Graph and a Plan. Leaves: `Block`s - an attention, an MLP or a token stage, with the sizes
and survivors that its kernels are specialised to - and the layers that share them. Everything comes
from the specialised Graph; what the kernels cannot compute is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from planner.ir.cost.workload import Workload
from planner.ir.dims import Dim
from planner.ir.graph import Graph, Operator, Site
from planner.ir.passes import NarrowTokens, Specialise, run
from planner.plan import Plan

__all__ = ["AttentionShape", "Block", "MLPShape", "Shape", "TokenShape", "blocks_of"]

# The Graph's name of an activation -> the kernels'.
ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "silu": "silu",
        "relu": "relu",
        "gelu": "gelu",
        "gelu_tanh": "gelu_pytorch_tanh",
        "gelu_new": "gelu_pytorch_tanh",
        "sigmoid": "quick_gelu",
    }
)


@dataclass(frozen=True)
class NormShape:
    """The norm in front of a block: ``rms`` or ``layer``, and whether it has a bias."""

    kind: str
    bias: bool = False


@dataclass(frozen=True)
class AttentionShape:
    """An attention block.

    Attributes:
        hidden: features of the residual stream.
        head_dim: lanes per head.
        group: query heads per KV group.
        groups: KV groups of the base model.
        kept: KV groups that survive, ascending.
        rotary: lanes of a head that turn; 0 where positions enter elsewhere.
        biases: which of ``query``, ``key``, ``value``, ``output`` have one.
        head_norm: whether queries and keys are normed head by head.
        norm: in front, or None.
        window: how far back a token sees, itself included; None for all the way.
        residual: whether the result is added to something at once.
    """

    hidden: int
    head_dim: int
    group: int
    groups: int
    kept: tuple[int, ...]
    rotary: int
    biases: tuple[str, ...] = ()
    head_norm: bool = False
    norm: NormShape | None = None
    window: int | None = None
    residual: bool = True

    @property
    def title(self) -> str:
        """For people: ``attention, 31 of 32 KV groups``."""
        return f"attention, {len(self.kept)} of {self.groups} KV groups"


@dataclass(frozen=True)
class MLPShape:
    """An MLP block; attributes as in `AttentionShape`.

    `kept` are the surviving neurons as half-open intervals.
    """

    hidden: int
    neurons: int
    kept: tuple[tuple[int, int], ...]
    activation: str
    gated: bool = True
    biases: tuple[str, ...] = ()
    norm: NormShape | None = None
    residual: bool = True

    @property
    def count(self) -> int:
        """Neurons that survive."""
        return sum(stop - start for start, stop in self.kept)

    @property
    def title(self) -> str:
        """For people: ``MLP, 10496 of 11008 neurons``."""
        return f"MLP, {self.count} of {self.neurons} neurons"


@dataclass(frozen=True)
class TokenShape:
    """A token stage that scores tokens by the attention of the last query (FastV).

    Attributes:
        hidden: features of the residual stream.
        head_dim, group: of the layer that scores.
        groups: KV groups of that layer.
        kept: how many of them survive.
        keep: image tokens that stay, of `of`.
    """

    hidden: int
    head_dim: int
    group: int
    groups: int
    kept: int
    keep: int
    of: int

    @property
    def title(self) -> str:
        """For people: ``tokens, 360 of 576``."""
        return f"tokens, {self.keep} of {self.of}"


Shape = AttentionShape | MLPShape | TokenShape


@dataclass(frozen=True)
class Block:
    """A shape at a number of rows, and where it stands.

    Attributes:
        shape: what is computed.
        phase: ``prefill`` or ``decode``.
        tokens: per sample, as many as are tiled for; the kernels take any number.
        context: tokens attended to.
        batch: samples.
        layers: that share it, ascending.
    """

    shape: Shape
    phase: str
    tokens: int
    context: int
    batch: int
    layers: tuple[int, ...]


def blocks_of(graph: Graph, plan: Plan, workload: Workload) -> tuple[list[Block], list[str]]:
    """The blocks that run under a plan, and one sentence for every block without kernels.

    Args:
        graph: of the base model.
        plan: made for it.
        workload: whose token counts tiles are chosen for.

    Raises:
        InputError: the plan does not fit the graph.
    """
    plan.check(graph)
    narrow = run(graph, (Specialise(plan), NarrowTokens(plan.tokens)))
    keep = {stage.layer: stage.keep for stage in plan.tokens}
    sizes = workload.prefill(keep)
    context = workload.image_tokens + workload.text_tokens + workload.new_tokens
    found: dict[Block, list[int]] = {}
    reasons: list[str] = []

    def add(shape: Shape, phase: str, tokens: int, context: int, layer: int) -> None:
        block = Block(shape, phase, tokens, context, workload.batch, ())
        found.setdefault(block, []).append(layer)

    reader = _Reader(graph, narrow, plan)
    for operator in narrow:
        if operator.kind == "select_tokens" and operator["score_width"]:
            tokens = _evaluated(operator["before"], sizes)
            add(reader.tokens(operator), "prefill", tokens, tokens, operator.layer or 0)
    for site in sorted(graph.sites, key=lambda site: site.layer):
        if site.kind not in ("heads", "mlp") or site.layer in plan.layers_off:
            continue
        try:
            shape, query = reader.shape(site)
        except _Unfit as why:
            reasons.append(f"{site.module}: {why}")
            continue
        if shape is None:
            continue
        tokens = _evaluated(query, sizes)
        add(shape, "prefill", tokens, tokens, site.layer)
        add(shape, "decode", 1, context, site.layer)
    for layer in sorted(set(range(graph.layers)) - set(plan.layers_off)):
        kinds = {site.kind for site in graph.sites_at(layer)}
        reasons += [
            f"layer {layer} has no {what} that can be narrowed"
            for kind, what in (("heads", "attention"), ("mlp", "MLP"))
            if kind not in kinds
        ]
    return [replace(block, layers=tuple(at)) for block, at in found.items()], reasons


def _evaluated(value: int | str | Dim, sizes: Mapping[str, int]) -> int:
    return Dim.of(value).evaluate(sizes)


class _Unfit(Exception):
    """Why a block has no kernels."""


class _Reader:
    """Reads shapes off a specialised graph; survivors come from the plan."""

    def __init__(self, graph: Graph, narrow: Graph, plan: Plan) -> None:
        self.graph, self.narrow, self.plan = graph, narrow, plan
        self.hidden = int(graph.properties["hidden_size"])
        self.linears = {o.module: o for o in narrow if o.kind == "linear" and o.part == "decoder"}

    def shape(self, site: Site) -> tuple[AttentionShape | MLPShape | None, Dim]:
        """The shape of a site's block, and its token count; None where nothing is left of it.

        Raises:
            _Unfit: the kernels compute something else than this block.
        """
        lanes = self.lanes(site)
        if not lanes:
            return None, Dim(0)
        linears = [self.linears.get(binding.module) for binding in site.bindings]
        if None in linears:
            raise _Unfit("its weights are not read by one linear each")
        sink = next(
            linear
            for linear, binding in zip(linears, site.bindings, strict=True)
            if linear is not None and binding.axis == "in"
        )
        query = sink.shape[1]
        if site.kind == "heads":
            return self.attention(site, sink, tuple(lanes)), query
        return self.mlp(sink, site.lanes, _intervals(lanes)), query

    def lanes(self, site: Site) -> Sequence[int]:
        if site.kind == "heads":
            kept = self.plan.heads.get(site.layer)
        else:
            kept = self.plan.mlp.get(site.layer)
            if kept is not None:
                site = replace(site, switches=self.plan.mlp_switches[site.layer])
        return range(site.lanes) if kept is None else site.lanes_of(kept)

    def attention(self, site: Site, sink: Operator, kept: tuple[int, ...]) -> AttentionShape:
        core = self.source(sink)
        if core.kind != "attention":
            raise _Unfit(f"its output projection reads {_article(core.kind)}")
        if core.get("capped"):
            raise _Unfit("its scores are capped")
        if core["head_dim"] != core["value_dim"]:
            raise _Unfit("its values are not as wide as its keys")
        head_dim = core.integer("head_dim")
        (query, query_path), (key, key_path), (value, value_path) = (
            self.linear_behind(name) for name in core.inputs[:3]
        )
        if len({query.name, key.name, value.name}) < 3:
            raise _Unfit("its queries, keys and values are rows of one weight")
        if value_path or len({operator.inputs for operator in (query, key, value)}) > 1:
            raise _Unfit("its queries, keys and values are not plain projections of one input")
        if query.integer("out") % key.integer("out") or key["out"] != len(kept) * head_dim:
            raise _Unfit("its heads do not come in KV groups")
        norms = [[o for o in path if o.kind == "norm"] for path in (query_path, key_path)]
        turns = [[o for o in path if o.kind == "rotary"] for path in (query_path, key_path)]
        every = [*norms[0], *norms[1]]
        if any(n.integer("width") != head_dim or _norm(n).kind != "rms" for n in every):
            raise _Unfit("its head norms are not RMSNorms over single heads")
        if len({*map(len, norms)}) > 1 or len({*map(len, turns)}) > 1 or len(turns[0]) > 1:
            raise _Unfit("its queries and keys are not treated alike")
        named = {"query": query, "key": key, "value": value, "output": sink}
        return AttentionShape(
            self.hidden,
            head_dim,
            query.integer("out") // key.integer("out"),
            site.lanes,
            kept,
            int(turns[0][0].get("lanes", head_dim)) if turns[0] else 0,
            tuple(name for name, linear in named.items() if linear["bias"]),
            bool(norms[0]),
            self.norm_before(query),
            core.get("window"),
            self.is_added(sink),
        )

    def mlp(self, sink: Operator, neurons: int, kept: tuple[tuple[int, int], ...]) -> MLPShape:
        product = self.source(sink)
        gated = product.kind == "multiply"
        parts = [self.narrow.by_name[name] for name in product.inputs] if gated else [product]
        activations = [part for part in parts if part.kind == "activation"]
        plain = [part for part in parts if part.kind == "linear"]
        if len(activations) != 1 or len(plain) != len(parts) - 1:
            raise _Unfit("it is not an activation, or one times a projection")
        (activation,) = activations
        function = ACTIVATIONS.get(str(activation["function"]))
        if function is None:
            raise _Unfit(f"its activation, {activation['function']}, is none of the kernels'")
        inner = self.source(activation)
        named = {"gate": inner, "up": plain[0]} if gated else {"up": inner}
        if inner.kind != "linear" or len({linear.inputs for linear in named.values()}) > 1:
            raise _Unfit("its activation does not read a projection of the block's input")
        return MLPShape(
            self.hidden,
            neurons,
            kept,
            function,
            gated,
            tuple(n for n, linear in (named | {"down": sink}).items() if linear["bias"]),
            self.norm_before(inner),
            self.is_added(sink),
        )

    def tokens(self, stage: Operator) -> TokenShape:
        """The shape of a token stage: it is scored by the last attention in front of it."""
        before = self.narrow.operators[: self.narrow.operators.index(stage)]
        core = next(o for o in reversed(before) if o.kind == "attention" and o.part == "decoder")
        kept = core.integer("kv_heads")
        site = self.graph.sites_by_name.get(f"heads.{core.layer}")
        return TokenShape(
            self.hidden,
            core.integer("head_dim"),
            core.integer("heads") // kept,
            kept if site is None else site.lanes,
            kept,
            stage.integer("keep"),
            stage.integer("of"),
        )

    def source(self, operator: Operator) -> Operator:
        """What an operator reads."""
        return self.narrow.by_name[operator.inputs[0]]

    def linear_behind(self, name: str) -> tuple[Operator, list[Operator]]:
        """The linear that a value is computed from, and the operators in between."""
        operator, path = self.narrow.by_name[name], []
        while operator.kind in ("norm", "rotary"):
            path.append(operator)
            operator = self.source(operator)
        if operator.kind != "linear":
            raise _Unfit(f"{_article(operator.kind)} stands between projection and attention")
        return operator, path

    def norm_before(self, linear: Operator) -> NormShape | None:
        source = self.source(linear)
        if source.kind != "norm" or source["width"] != self.hidden:
            return None
        return _norm(source)

    def is_added(self, sink: Operator) -> bool:
        readers = [self.narrow.by_name[name] for name in self.narrow.network[sink.name]]
        return [reader.kind for reader in readers] == ["add"]


def _norm(operator: Operator) -> NormShape:
    bias = bool(operator["bias"])
    return NormShape("layer" if bias or operator.get("centred") else "rms", bias)


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _intervals(lanes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as half-open intervals."""

    def runs() -> Iterator[tuple[int, int]]:
        start = lanes[0]
        for index, lane in enumerate(lanes):
            if index + 1 == len(lanes) or lanes[index + 1] != lane + 1:
                yield start, lane + 1
                start = lanes[index + 1] if index + 1 < len(lanes) else 0

    return tuple(runs())
