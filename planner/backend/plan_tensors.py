"""Plans as tensors, which compiled graphs are given at every call: another plan is other data.

Shapes never change, so nothing is compiled again. Models of one class may share a compiled graph;
each is given its own tensors, for the plans of the context that calls it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import tracing
from torch._subclasses.fake_tensor import unset_fake_temporarily

from planner.backend.captured_prompts import prompt_of
from planner.backend.compile_options import Options, check_budget
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


class PlanTensors:
    """Makes the graphs that were compiled for a model obey the plans of its session."""

    # Tensors of this many sets of plans are kept.
    KEPT = 16

    def __init__(self, session: Session, options: Options) -> None:
        self.session = session
        self.options = options
        self.graph = _runnable(session.graph, session.layers)
        self._resets = _resets
        self._tensors: OrderedDict[tuple[object, ...], dict[PlanTensor, Tensor]] = OrderedDict()
        self._dense: dict[tuple[object, ...], bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model."""
        return self.__dict__ | {"_tensors": OrderedDict()}

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

    def accept(self, plans: tuple[Plan, ...]) -> Program:
        """Check plans; raise InputError where they cannot be carried out."""
        check_budget(plans)
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
        known = (inputs["input_ids"], inputs.get("pixel_values"))
        return prompt_of(self.session, *known, self.options.request.new_tokens)

    def changed(self) -> None:
        """The next call looks for itself."""

    def close(self) -> None:
        """Graphs of a model without a session run as they were captured."""

    def has(self, site: BoundSite) -> bool:
        """Whether plans may narrow a site."""
        return site.site.name in self.graph.sites_by_name

    def is_dense(self, program: Program) -> bool:
        """Whether a program leaves no head and no neuron out."""
        if program.key not in self._dense:
            self._dense[program.key] = all(
                count_of(_lanes(group, site)) == site.site.lanes
                for layer in program.layers
                for site in (layer.layer.heads, layer.layer.mlp)
                for group in layer.groups
                if site is not None
            )
        return self._dense[program.key]

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

    What `planner.budget` has set before the model's first call holds from here on. NotLowered where
    the model cannot be lowered, as its session says too; InputError where the budget cannot be met,
    or `planner.compile` has the model.
    """
    session = Session.of(model) or Session(model)
    known = session.implementation
    if isinstance(known, PlanTensors) and known.options == options:
        return session
    if known is not None and not isinstance(known, PlanTensors):
        raise InputError(
            "planner.compile has this model already: planner.restore it first, or torch.compile it "
            "with another backend, such as inductor"
        )
    # A compilation is under way; the export that lowers the model is none of its business.
    with unset_fake_temporarily(), tracing(None):
        try:
            tensors = PlanTensors(session, options)
            if not tensors.graph.sites:
                raise NotLowered(_why_nothing_runs(session.layers))
        except Exception as error:
            why = str(error)
            if not isinstance(error, NotLowered):
                why = f"it cannot be lowered ({type(error).__name__}: {error})"
            session.obstacle = f"{type(model).__name__} runs dense: {why}"
            raise NotLowered(why) from error
    request = measurable(replace(options.request, model=session.graph.name), session)
    planning = Planning(tensors.graph, request, Measuring(session))
    before = known, session.planning
    session.implementation, session.planning = tensors, planning
    try:
        with unset_fake_temporarily(), tracing(None):
            session.default = session.asking(options.request.budget)
    except BaseException:
        session.implementation, session.planning = before
        raise
    return session


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

    A layer is left out by leaving out all heads and all neurons. So it must have both, and what
    follows them must make zeros of zeros.
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
        inner = [bound.get(f"{kind}.{site.layer}") for kind in ("heads", "mlp")]
        return all(found is not None and _vanishes(graph, found) for found in inner)

    return graph.replacing(graph.operators, [site for site in graph.sites if runs(site)])


def _vanishes(graph: Graph, site: BoundSite) -> bool:
    """Whether a block whose last linear gives zeros adds nothing to the residual stream."""
    sinks = [o for o in graph if ("in", site.site.name) in o.narrowed_by]
    reader = sinks[0] if len(sinks) == 1 else None
    while reader is not None and reader.kind != "add":
        readers = [graph.by_name[name] for name in graph.network[reader.name]]
        reader = readers[0] if len(readers) == 1 else None
        shifts = reader is not None and reader.kind == "norm" and reader.get("bias", 0)
        if shifts or (reader is not None and reader.kind not in ("norm", "multiply", "add")):
            return False
    return reader is not None


def _why_nothing_runs(layers: Sequence[BoundLayer]) -> str:
    sites = [site for layer in layers for site in (layer.heads, layer.mlp) if site is not None]
    obstacles = [site.obstacle for site in sites if site.obstacle]
    return obstacles[0] if obstacles else "the linears of all its blocks have adapters"
