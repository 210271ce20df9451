"""The Plan: which switches stay on, for which budget, at what predicted cost, and from where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from planner.documents import check_signed, dump_yaml, of_format, read_yaml, signed, validated
from planner.files import write_text
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Site
from planner.ir.intervals import Intervals, count_of, merged, print_ranges, read_ranges

FORMAT = 1


@dataclass(frozen=True)
class TokenStage:
    """Image tokens are reduced to `keep` (of `of`, per sample) before decoder layer `layer`.

    `selector` names the rule that picks them, with or without its arguments
    (`planner.planning.selectors`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layer: Annotated[int, Field(ge=0)]
    keep: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(gt=0)]
    selector: str = "uniform"


@dataclass(frozen=True)
class Kept:
    """What a plan keeps of one site."""

    switches: tuple[int, ...]  # that stay on, ascending
    of: int  # into how many switches the plan divides the site
    lanes: Intervals  # that stay on: all of 8 are ``((0, 8),)``, none is ``()``

    @property
    def count(self) -> int:
        """How many lanes stay on."""
        return count_of(self.lanes)

    @property
    def everything(self) -> bool:
        """Whether the site stays as it is in the base model."""
        return len(self.switches) == self.of

    @property
    def nothing(self) -> bool:
        """Whether the site does not run."""
        return not self.switches


@dataclass(frozen=True)
class Plan:
    """An assignment of all switches of one model.

    What it keeps of a site is read by `kept` and written by `keeping`; the fields `heads`, `mlp`
    and `mlp_switches` are how the file stores it, and nothing outside this module reads them.
    """

    model: str  # what the user called the model
    fingerprint: str  # of the Graph it was made for; a plan for another model is refused
    layers: int  # of the base model's decoder
    layers_off: tuple[int, ...] = ()  # decoder layers that do not run, ascending
    # Layer -> kept switches of its attention block (KV groups) and of its MLP, ascending; a layer
    # that is absent keeps all of them.
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    mlp: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    # Layer -> into how many switches its neurons are divided (see `Site.bounds`).
    mlp_switches: Mapping[int, int] = field(default_factory=dict)
    tokens: tuple[TokenStage, ...] = ()  # by layer
    kv: str = ""  # policy of the KV cache, such as ``h2o:heavy=0.2``; "" keeps everything
    # What was asked for, for example ``{"flops": "0.65 of base"}``.
    budget: Mapping[str, Any] = field(default_factory=dict)
    # Metric -> ``{"plan": x, "base": y, "fraction": x / y}``; FLOPs, seconds, bytes.
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # Metric -> share of its limit that the plan uses.
    utilisation: Mapping[str, float] = field(default_factory=dict)
    solver: Mapping[str, Any] = field(default_factory=dict)  # status, utility, bound, gap
    # Utilities, workload, scope, switches, device, planner version.
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph, **fields: Any) -> Plan:
        """A plan for a graph, which keeps everything but what the other fields say."""
        return Plan(graph.name, str(graph.properties["fingerprint"]), graph.layers, **fields)

    @property
    def is_dense(self) -> bool:
        """Whether everything stays on."""
        return not (self.layers_off or self.heads or self.mlp or self.tokens or self.kv)

    @property
    def key(self) -> tuple[object, ...]:
        """What is switched, without budget, costs and provenance: equal keys run equally."""
        return (
            self.layers_off,
            tuple(sorted((n, tuple(kept)) for n, kept in self.heads.items())),
            tuple(sorted((n, tuple(k), self.mlp_switches.get(n)) for n, k in self.mlp.items())),
            self.tokens,
            self.kv,
        )

    def kept(self, site: Site) -> Kept:
        """What stays on of a layer, an attention block or an MLP; nothing in a layer that is off.

        The site is of the graph that the plan is for. An MLP that the plan narrows is divided as
        the plan says, whatever ``site.switches`` is.
        """
        if site.kind == "mlp" and site.layer in self.mlp:
            site = replace(site, switches=self.mlp_switches[site.layer])
        stored = {"heads": self.heads, "mlp": self.mlp}.get(site.kind, {})
        switches = tuple(stored.get(site.layer, range(site.switches)))
        if site.layer in self.layers_off:
            switches = ()
        bounds = site.bounds
        lanes = merged((bounds[switch], bounds[switch + 1]) for switch in switches)
        return Kept(switches, site.switches, lanes)

    def keeping(self, kept: Iterable[tuple[Site, Sequence[int]]]) -> Plan:
        """The plan with other attention blocks and MLPs narrowed: to these of their switches.

        Sites that are absent keep everything, and so do those in layers that are off.
        """
        narrowed = [
            (site, tuple(switches))
            for site, switches in kept
            if site.layer not in self.layers_off and len(switches) < site.switches
        ]
        return replace(
            self,
            heads={site.layer: switches for site, switches in narrowed if site.kind == "heads"},
            mlp={site.layer: switches for site, switches in narrowed if site.kind == "mlp"},
            mlp_switches={s.layer: s.switches for s, _ in narrowed if s.kind == "mlp"},
        )

    def check(self, graph: Graph) -> None:
        """Raise InputError unless this plan was made for this graph and fits it."""
        if self.fingerprint != graph.properties.get("fingerprint"):
            raise InputError(
                f"the plan was made for '{self.model}' ({self.fingerprint}), "
                f"not for '{graph.name}' ({graph.properties.get('fingerprint')})"
            )
        if self.layers != graph.layers:
            raise InputError(
                f"the plan is for {self.layers} layers, and '{graph.name}' has {graph.layers}"
            )
        _within("layers that are off", self.layers_off, graph.layers)
        for layer, kept in self.heads.items():
            _within(f"heads of layer {layer}", kept, _lanes(graph, f"heads.{layer}"))
        for layer, kept in self.mlp.items():
            lanes = _lanes(graph, f"mlp.{layer}")
            switches = self.mlp_switches.get(layer, 0)
            if not 0 < switches <= lanes:
                raise InputError(
                    f"the plan divides {lanes} neurons of layer {layer} into {switches}"
                )
            _within(f"MLP groups of layer {layer}", kept, switches)
        for layer in self.layers_off:
            if layer in self.heads or layer in self.mlp:
                raise InputError(f"the plan narrows layer {layer}, which it leaves out")
        self._check_stages(graph)

    def _check_stages(self, graph: Graph) -> None:
        """Image tokens can only become fewer, at layers that are there."""
        layers = [stage.layer for stage in self.tokens]
        _within("token stages", layers, graph.layers)
        if not self.tokens:
            return
        sees = any(operator.part == "vision" for operator in graph)
        if graph.properties.get("image_tokens") == 0 and not sees:
            raise InputError(f"the plan drops image tokens, and '{graph.name}' reads no images")
        of = self.provenance.get("image_tokens", self.tokens[0].of)
        left = of
        for stage in self.tokens:
            if stage.of != of:
                raise InputError(
                    f"the plan keeps {stage.keep} of {stage.of} image tokens before layer "
                    f"{stage.layer}, and it was made for {of}"
                )
            if not 0 <= stage.keep <= left:
                raise InputError(
                    f"the plan keeps {stage.keep} image tokens before layer {stage.layer}, "
                    f"and only {left} are left there"
                )
            left = stage.keep


def _lanes(graph: Graph, name: str) -> int:
    site = graph.sites_by_name.get(name)
    if site is None:
        raise InputError(f"the plan narrows {name}, which '{graph.name}' does not have")
    return site.lanes


def _within(what: str, indices: Sequence[int], count: int) -> None:
    if any(not 0 <= i < count for i in indices) or list(indices) != sorted(set(indices)):
        raise InputError(f"the plan's {what} must be ascending numbers below {count}")


# -- the file -------------------------------------------------------------------------------------


# More than any model has; what a file claims is held against its model by `Plan.check`.
_MOST_LAYERS = 10_000
_MOST_HEADS = 10_000
_MOST_NEURONS = 1_000_000
# Kept switches of all layers together.
_MOST_SWITCHES = 10_000_000


class _Mlp(BaseModel):
    model_config = ConfigDict(extra="forbid")
    of: int = Field(gt=0, le=_MOST_NEURONS)
    keep: str


def _whole_or_finite(value: Any, validate: ValidatorFunctionWrapHandler) -> float:
    number: float = validate(value)
    return value if type(value) is int else number


# Whole numbers stay whole, so that a plan that was read has the digest of its file.
_Number = Annotated[FiniteFloat, WrapValidator(_whole_or_finite)]


class _File(BaseModel):
    """Schema of a plan file."""

    model_config = ConfigDict(extra="forbid")
    planner_plan: int
    model: str
    fingerprint: str
    digest: str
    layers: int = Field(gt=0, le=_MOST_LAYERS)
    layers_off: str
    heads: dict[int, str]
    mlp: dict[int, _Mlp]
    tokens: tuple[TokenStage, ...]
    # Absent in plans of before there were policies.
    kv: str = "none"
    budget: dict[str, Any]
    cost: dict[str, dict[str, _Number]]
    utilisation: dict[str, _Number]
    solver: dict[str, Any]
    provenance: dict[str, Any]


# Fields of a plan that its file holds unchanged.
_AS_THEY_ARE = (
    "model", "fingerprint", "layers", "tokens", "budget", "cost", "utilisation", "solver",
    "provenance",
)  # fmt: skip


def _document(plan: Plan) -> dict[str, Any]:
    document: dict[str, Any] = {"planner_plan": FORMAT, **asdict(plan)}
    switches = document.pop("mlp_switches")
    document["layers_off"] = print_ranges(plan.layers_off)
    document["heads"] = {n: print_ranges(kept) for n, kept in sorted(plan.heads.items())}
    document["mlp"] = {
        n: {"of": switches[n], "keep": print_ranges(kept)} for n, kept in sorted(plan.mlp.items())
    }
    document["kv"] = plan.kv or "none"
    return document


def plan_digest(plan: Plan) -> str:
    """The digest that the plan's file carries."""
    return str(signed(_document(plan))["digest"])


def dump_plan(plan: Plan) -> str:
    """The plan as YAML: equal plans give equal bytes."""
    body = dump_yaml(signed(_document(plan)))
    return f"# A plan of planner {FORMAT}: which switches of the model stay on.\n{body}"


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan file, whole or not at all."""
    write_text(path, dump_plan(plan))


def load_plan(path: Path) -> Plan:
    """Read and validate a plan file; every fault is one sentence in an InputError."""
    document = read_yaml(Path(path), "plan")
    of_format(document, "planner_plan", FORMAT, Path(path), "plan")
    parsed = validated(_File, document, f"the plan '{path}'")
    check_signed(document, Path(path), "plan")
    try:
        return _plan(parsed)
    except ValueError as error:
        raise InputError(f"the plan '{path}' is broken: {error}") from None


def _plan(parsed: _File) -> Plan:
    """The plan of a file; ValueError where a range is none or goes too far."""
    left = _MOST_SWITCHES

    def kept(text: str, below: int) -> tuple[int, ...]:
        nonlocal left
        numbers = read_ranges(text, min(below, left))
        left -= len(numbers)
        return numbers

    same = {name: getattr(parsed, name) for name in _AS_THEY_ARE}
    return Plan(
        **same,
        layers_off=kept(parsed.layers_off, parsed.layers),
        heads={layer: kept(text, _MOST_HEADS) for layer, text in parsed.heads.items()},
        mlp={layer: kept(entry.keep, entry.of) for layer, entry in parsed.mlp.items()},
        mlp_switches={layer: entry.of for layer, entry in parsed.mlp.items()},
        kv="" if parsed.kv == "none" else parsed.kv,
    )
