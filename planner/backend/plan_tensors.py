"""Plans as tensors, which compiled graphs are given at every call: another plan is other data.

Shapes never change, so nothing is compiled again. Models of one class may share a compiled graph;
each is given its own tensors, for the plans of the context that calls it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._guards import tracing
from torch._subclasses.fake_tensor import unset_fake_temporarily

from planner.backend.captured_prompts import prompt_of
from planner.backend.compile_options import Options, check_budget
from planner.backend.vanishing import vanishes
from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Site
from planner.ir.intervals import Intervals, count_of, numbers_of
from planner.ir.lowering import NotLowered
from planner.kernels.survivors import Survivors, neuron_width
from planner.models.recovery.recovering import Measuring, measurable
from planner.models.running.bindings import BoundLayer, BoundSite
from planner.models.running.planning import Planning
from planner.models.running.program import LayerGroup, Program, check_plan
from planner.models.running.session import Session, Setting
from planner.plan import Plan

# How often `torch.compiler.reset` was called.
_resets = 0
# Models that `planner.restore` was called for -> how often it was then.
_let_go: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class PlanTensor:
    """A tensor that a compiled graph is given, whatever the model and the plan are.

    Of the kinds ``units``, ``counts`` and ``lanes`` are `planner.kernels.survivors.Survivors`' own
    (units of an MLP are `neuron_width` neurons wide); ``mask`` is 1 for features of the site's last
    linear that are kept, else 0, shape (rows, 1, features); ``on`` is 1 for samples that run the
    layer, else 0, shape (rows, 1, 1).
    """

    kind: str
    layer: int  # of the decoder
    site: str  # ``heads`` or ``mlp``
    device: torch.device
    dtype: torch.dtype | None = None  # of ``mask`` and ``on``

    @property
    def name(self) -> str:
        """Of the site."""
        return f"{self.site}.{self.layer}"


class PlanTensors:
    """Makes the graphs that were compiled for a model obey the plans of its session."""

    # Tensors of this many sets of plans are kept.
    KEPT = 16

    def __init__(self, session: Session, options: Options) -> None:
        self.session = session
        self.options = options
        self._layers = session.layers
        self.graph = _runnable(session.graph, self._layers)
        # Sites that could be narrowed when the model was compiled, and can no more.
        self._lost: frozenset[str] = frozenset()
        # Whether some graph obeys: one that cannot is refused from then on.
        self.obeys = False
        self._resets = _resets
        self._tensors: OrderedDict[tuple[object, ...], dict[PlanTensor, Tensor]] = OrderedDict()
        self._narrowed: dict[tuple[object, ...], frozenset[str]] = {}
        # Id of what a site's last weight is kept as -> that, and the site's name.
        self._sinks: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.look_again()

    @property
    def goes_with_copies(self) -> bool:
        """Not so: a copy of a compiled model is not compiled."""
        return False

    @property
    def is_over(self) -> bool:
        """Whether `torch.compiler.reset` has forgotten what obeyed."""
        return self._resets != _resets

    @property
    def kept_image_tokens(self) -> dict[int, list[int]]:
        """None is dropped."""
        return {}

    @property
    def compile_options(self) -> dict[str, Any]:
        """As `planner.compile` takes them."""
        return {"kernels": str(self.options.kernels)}

    @property
    def changed_since(self) -> str:
        """Which blocks were exchanged since the model was compiled, in a sentence; "" for none."""
        if self.session.layers is not self._layers:
            self._layers = self.session.layers
            left = _runnable(self.session.graph, self._layers).sites_by_name
            self._lost = frozenset(self.graph.sites_by_name.keys() - left)
            self.look_again()
        if not self._lost:
            return ""
        return (
            f"{min(self._lost)} was plain when the model was compiled, and is quantised, adapted "
            "or replaced now: call torch.compiler.reset(), and the next call compiles it as it is"
        )

    def look_again(self) -> None:
        """Find the parameters of the model's sites, where some were exchanged."""
        self._sinks = {}
        shared: set[int] = set()
        for layer in self._layers:
            for site in (layer.heads, layer.mlp):
                if site is not None and self.has(site):
                    kept = site.sink.stored[0]
                    shared |= {id(kept)} & self._sinks.keys()
                    self._sinks[id(kept)] = weakref.ref(kept), site.site.name
        for key in shared:
            del self._sinks[key]

    def site_of(self, tensor: Any) -> str | None:
        """The site whose last linear has this weight; None where it is of none, or of several."""
        found = self._sinks.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def accept(self, plans: tuple[Plan, ...]) -> Program:
        """Check plans; raise InputError where they cannot be carried out."""
        check_budget(plans)
        if why := self.changed_since:
            raise InputError(f"no plan can be obeyed: {why}")
        samples = self.options.samples
        if len(plans) not in (1, samples):
            raise InputError(
                f"{len(plans)} plans for graphs that take {samples}: compile with "
                f"options={{'samples': {len(plans)}}}"
            )
        for plan in plans:
            check_plan(plan, self.graph)
        return self.session.program_of(Setting(plans))

    def prepare(self, graph: Graph) -> None:
        """Tensors are made as they are asked for."""

    def prompt_of(self, inputs: Mapping[str, Any]) -> Workload:
        """The prompt that these inputs of the model are, by their sizes."""
        tokens, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        return prompt_of(self.session, tokens, pixels, self.options.request.new_tokens)

    def changed(self) -> None:
        """The next call looks for itself."""

    def close(self) -> None:
        """Graphs of a model without a session run as they were captured."""
        _let_go[self.session.model] = _resets

    def has(self, site: BoundSite) -> bool:
        """Whether plans may narrow a site."""
        name = site.site.name
        return not site.obstacle and name in self.graph.sites_by_name and name not in self._lost

    def narrowed(self, program: Program) -> frozenset[str]:
        """Names of the attention blocks and MLPs that a program leaves anything out of."""
        if program.key not in self._narrowed:
            self._narrowed[program.key] = frozenset(
                site.site.name
                for layer in program.layers
                for site in (layer.layer.heads, layer.layer.mlp)
                for group in layer.groups
                if site is not None and count_of(_lanes(group, site)) != site.site.lanes
            )
        return self._narrowed[program.key]

    def of(self, program: Program, wanted: Sequence[PlanTensor]) -> list[Tensor]:
        """The tensors that a graph wants, for a program."""
        known = self._tensors.setdefault(program.key, {})
        self._tensors.move_to_end(program.key)
        if len(self._tensors) > self.KEPT:
            self._tensors.popitem(last=False)
        if any(tensor not in known for tensor in wanted):
            # Tensors made in inference mode could not be used outside of it.
            with torch.inference_mode(False), unset_fake_temporarily():
                for tensor in wanted:
                    if tensor not in known:
                        known |= self._made(program, tensor)
        return [known[tensor] for tensor in wanted]

    def _made(self, program: Program, wanted: PlanTensor) -> dict[PlanTensor, Tensor]:
        """A tensor, and those that come with it."""
        layer = program.layers[wanted.layer]
        by_sample = {sample: group for group in layer.groups for sample in group.samples}
        groups = [by_sample[sample] for sample in sorted(by_sample)]
        groups = groups * self.options.samples if len(groups) == 1 else groups
        if wanted.kind == "on":
            on = torch.tensor([float(group.on) for group in groups], dtype=wanted.dtype)
            return {wanted: on.view(-1, 1, 1).to(wanted.device)}
        site = layer.layer.heads if wanted.site == "heads" else layer.layer.mlp
        assert site is not None
        if wanted.kind == "mask":
            mask = torch.zeros(len(groups), 1, site.sink.features, dtype=wanted.dtype)
            for row, group in zip(mask, groups, strict=True):
                for start, stop in site.sink.runs(_lanes(group, site)) if group.on else ():
                    row[:, start:stop] = 1
            return {wanted: mask.to(wanted.device)}
        width = neuron_width(site.site.lanes) if wanted.site == "mlp" else 1
        lanes = [numbers_of(_lanes(group, site)) for group in groups]
        found = Survivors.of(lanes, site.site.lanes, width)
        every = torch.full_like(found.units, 2**width - 1)
        tensors = {
            "units": found.units,
            "counts": found.counts,
            "lanes": every if found.lanes is None else found.lanes,
        }
        return {
            replace(wanted, kind=kind): tensor.to(wanted.device) for kind, tensor in tensors.items()
        }


def adopted(model: nn.Module, options: Options) -> Session:
    """The session of a model that is compiled with some options.

    What `planner.budget` has set before the model's first call holds from here on, and so do plans
    that a copy of a compiled model takes along. NotLowered where the model cannot be lowered, as
    its session says too; InputError where the budget cannot be met, somebody has set one that
    cannot be obeyed, the model is compiled with other options, or `planner.compile` has it.
    """
    session = Session.of(model) or Session(model)
    session.check_copy(model)
    known = session.implementation
    if isinstance(known, PlanTensors):
        if known.options == options:
            return session
        raise InputError(
            f"this {type(model).__name__} is compiled with other options already: planner.budget "
            "changes its budget, and torch.compiler.reset() forgets its options"
        )
    if known is not None:
        raise InputError(
            "planner.compile has this model already: planner.restore it first, or torch.compile it "
            "with another backend, such as inductor"
        )
    waiting = session.setting
    _let_go.pop(model, None)
    # A compilation is under way; the export that lowers the model is none of its business.
    with unset_fake_temporarily(), tracing(None):
        try:
            tensors = PlanTensors(session, options)
            if not tensors.graph.sites:
                raise NotLowered(_why_nothing_runs(session.layers))
        except Exception as error:
            why = str(error)
            if not isinstance(error, NotLowered | InputError):
                why = f"it cannot be lowered ({type(error).__name__}: {error})"
            refuse(session, f"{type(model).__name__} runs dense: {why}")
            if waiting is not None:
                raise InputError(f"no plan can be obeyed: {session.obstacle}") from error
            raise NotLowered(why) from error
    session.obstacle = ""
    request = measurable(replace(options.request, model=session.graph.name), session)
    planning = Planning(tensors.graph, request, Measuring(session))
    before = session.default, session.planning
    session.implementation, session.planning = tensors, planning
    try:
        with unset_fake_temporarily(), tracing(None):
            asked = options.request.budget if before[0] is None else before[0].asked
            session.default = session.asking(asked)
    except BaseException:
        session.implementation, (session.default, session.planning) = None, before
        raise
    return session


def refuse(session: Session, why: str) -> None:
    """Have a model run dense, and say why to whoever sets a budget, until the compiler is reset."""
    since = _resets
    session.obstacle, session.obstacle_is_over = why, lambda: since != _resets


def is_let_go(model: nn.Module) -> bool:
    """Whether `planner.restore` has let go of a model, and nobody has reset the compiler since."""
    return _let_go.get(model) == _resets


def forget() -> None:
    """As if no graph had been compiled yet."""
    global _resets
    _resets += 1


def _lanes(group: LayerGroup, site: BoundSite) -> Intervals:
    """Lanes that a layer keeps of its heads or its MLP."""
    if not group.on:
        return ()
    lanes = group.heads if site.site.kind == "heads" else group.mlp
    return ((0, site.site.lanes),) if lanes is None else lanes


def _runnable(graph: Graph, layers: Sequence[BoundLayer]) -> Graph:
    """The graph with the sites alone that compiled graphs can narrow.

    A layer is left out by leaving out all heads and all neurons. So it must have both, and add
    nothing else to the stream.
    """
    bound: Mapping[str, BoundSite] = {
        site.site.name: site
        for layer in layers
        for site in (layer.heads, layer.mlp)
        if site is not None
        and not site.obstacle
        and all(isinstance(linear.host, nn.Linear) for linear in site.linears)
    }

    def runs(site: Site) -> bool:
        if site.kind != "layer":
            return site.name in bound
        inner = {f"{kind}.{site.layer}" for kind in ("heads", "mlp")}
        return inner <= bound.keys() and vanishes(graph, site, inner, layers[site.layer].module)

    return graph.replacing(graph.operators, [site for site in graph.sites if runs(site)])


def _why_nothing_runs(layers: Sequence[BoundLayer]) -> str:
    sites = [site for layer in layers for site in (layer.heads, layer.mlp) if site is not None]
    obstacles = [site.obstacle for site in sites if site.obstacle]
    if obstacles or not sites:
        return obstacles[0] if obstacles else "no attention block or MLP of it can be narrowed"
    hosts = {type(linear.host).__name__ for site in sites for linear in site.linears}
    return f"the linears of all its blocks are {' and '.join(sorted(hosts))}, not torch.nn.Linear"
