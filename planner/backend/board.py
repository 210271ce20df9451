"""The switchboard of a model: plans as tensors that compiled graphs read.

Every graph that was compiled for a model reads the same tensors. Another plan is written into them
in place; shapes never change, so nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._guards import tracing
from torch._subclasses.fake_tensor import unset_fake_temporarily

from planner.api import Planning, name_of
from planner.backend.options import Options, check_budget
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Site
from planner.ir.intervals import intervals_of
from planner.ir.lowering import NotLowered, lower_model
from planner.kernels.survivors import Survivors, neuron_width
from planner.models.running.bindings import BoundLayer, BoundSite, bind
from planner.models.running.program import LayerGroup, Program
from planner.plan import Plan

__all__ = ["Board", "board_of", "forget_boards"]

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Dial:
    """Tensors that show what one layer does, sample by sample."""

    layer: int
    read: Callable[[Sequence[LayerGroup]], Tensors]
    tensors: Tensors


class Board:
    """What the compiled graphs of one model obey.

    Attributes:
        layers: the model's decoder layers and their modules; empty until `adopt`.
        plans: obeyed now, one for all samples or one each.
        dense: whether these leave nothing out.
    """

    def __init__(self) -> None:
        self.layers: tuple[BoundLayer, ...] = ()
        self.plans: tuple[Plan, ...] = ()
        self.dense = True
        self._asked: Any = None
        self._options: Options | None = None
        self._planning: Planning | None = None
        self._program: Program | None = None
        self._dials: dict[tuple[object, ...], _Dial] = {}

    def adopt(self, model: nn.Module, options: Options) -> None:
        """Take up the options of a compilation, and obey their budget unless `ask` came first.

        Raises:
            NotLowered: the model cannot be lowered.
            InputError: the budget cannot be met.
        """
        if options == self._options:
            return
        if self._planning is None:
            # A compilation is under way; the export that lowers the model is none of its business.
            with unset_fake_temporarily(), tracing(None):
                graph = _lowered(model)
            self.layers = bind(model, graph)
            self._planning = Planning(_runnable(graph, self.layers), options.request)
        planning = Planning(
            self._planning.graph, replace(options.request, model=self._planning.graph.name)
        )
        first = self._options is None
        value = self._asked if first and self._asked is not None else options.request.budget
        plans = _plans(planning, value, options.samples)
        if self._options is not None and options.samples != self._options.samples:
            self._dials.clear()
        self._planning, self._options = planning, options
        self._obey(plans)

    def ask(self, value: Any) -> tuple[Plan, ...]:
        """Obey another budget or other plans; see `planner.backend.set_budget`."""
        check_budget(value)
        if self._planning is None or self._options is None:
            self._asked = value
        else:
            self._obey(_plans(self._planning, value, self._options.samples))
        return self.plans

    def forget(self) -> None:
        """Forget options, plans and the tensors of graphs that are no more; keep the lowering."""
        self.plans, self._program = (), None
        self._asked = self._options = None
        self._dials.clear()

    def _obey(self, plans: tuple[Plan, ...]) -> None:
        assert self._planning is not None
        self._program = Program.build(plans, self._planning.graph, self.layers)
        self.plans = plans
        self.dense = all(
            len(_lanes(act, site.site.kind, site.site.lanes)) == site.site.lanes
            for layer in self.layers
            for site in (layer.heads, layer.mlp)
            for act in self._program.layers[layer.index].groups
            if site is not None
        )
        with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
            for dial in self._dials.values():
                for name, tensor in dial.read(self._acts(dial.layer)).items():
                    dial.tensors[name].copy_(tensor)

    def _acts(self, layer: int) -> list[LayerGroup]:
        """What a layer does for every row of the tensors."""
        assert self._program is not None
        assert self._options is not None
        groups = self._program.layers[layer].groups
        acts = {sample: group for group in groups for sample in group.samples}
        rows = [acts[sample] for sample in sorted(acts)]
        return rows * self._options.samples if len(rows) == 1 else rows

    def switches(self, site: BoundSite) -> bool:
        """Whether plans may narrow a site."""
        return self._planning is not None and site.site.name in self._planning.graph.sites_by_name

    # -- what graphs read --------------------------------------------------------------------

    def survivors(self, site: BoundSite, device: torch.device) -> Tensors:
        """Surviving units of a site: ``units`` and ``counts``, of an MLP ``lanes`` as well.

        The tensors of `planner.kernels.survivors.Survivors`; units of an MLP are `neuron_width`
        neurons wide.
        """
        kind, total = site.site.kind, site.site.lanes
        width = neuron_width(total) if kind == "mlp" else 1

        def read(acts: Sequence[LayerGroup]) -> Tensors:
            found = Survivors.of([_lanes(act, kind, total) for act in acts], total, width)
            tensors = {"units": found.units, "counts": found.counts}
            if kind == "mlp":
                every = torch.full_like(found.units, 2**width - 1)
                tensors["lanes"] = every if found.lanes is None else found.lanes
            return tensors

        return self._dial((site.site.name, "survivors", device), site.site.layer, read, device)

    def mask(self, site: BoundSite, like: Tensor) -> Tensor:
        """1 for features of the site's last linear that are kept, else 0: (rows, 1, features)."""
        kind, sink = site.site.kind, site.sink

        def read(acts: Sequence[LayerGroup]) -> Tensors:
            mask = torch.zeros(len(acts), 1, sink.features, dtype=like.dtype)
            for row, act in zip(mask, acts, strict=True):
                lanes = _lanes(act, kind, site.site.lanes)
                for start, stop in sink.runs(intervals_of(lanes)) if act.on else ():
                    row[:, start:stop] = 1
            return {"mask": mask}

        key = (site.site.name, "mask", like.device, like.dtype)
        return self._dial(key, site.site.layer, read, like.device)["mask"]

    def on(self, layer: int, like: Tensor) -> Tensor:
        """1 for samples that run a layer, else 0: (rows, 1, 1)."""

        def read(acts: Sequence[LayerGroup]) -> Tensors:
            rows = [float(act.on) for act in acts]
            return {"on": torch.tensor(rows, dtype=like.dtype).view(-1, 1, 1)}

        return self._dial((layer, "on", like.device, like.dtype), layer, read, like.device)["on"]

    def _dial(
        self,
        key: tuple[object, ...],
        layer: int,
        read: Callable[[Sequence[LayerGroup]], Tensors],
        device: torch.device,
    ) -> Tensors:
        if key not in self._dials:
            # Tensors made in inference mode could not be written to outside of it.
            with torch.inference_mode(False), unset_fake_temporarily():
                tensors = {n: t.to(device) for n, t in read(self._acts(layer)).items()}
            self._dials[key] = _Dial(layer, read, tensors)
        return self._dials[key].tensors


_boards: WeakKeyDictionary[nn.Module, Board] = WeakKeyDictionary()


def board_of(model: nn.Module) -> Board:
    """The one board of a model."""
    return _boards.setdefault(model, Board())


def forget_boards() -> None:
    """As if no graph had been compiled yet."""
    for board in list(_boards.values()):
        board.forget()


def _lowered(model: nn.Module) -> Graph:
    """The model's Graph; whatever keeps a model from being lowered is told as NotLowered."""
    try:
        return lower_model(model, name_of(model))
    except NotLowered:
        raise
    except Exception as error:
        raise NotLowered(f"it cannot be lowered ({type(error).__name__}: {error})") from error


def _plans(planning: Planning, value: Any, samples: int) -> tuple[Plan, ...]:
    """Plans for a budget, or the plans given, as many as fit a batch."""
    given = isinstance(value, list | tuple) and any(isinstance(plan, Plan) for plan in value)
    plans = tuple(value) if given else (planning.plan(value),)
    check_budget(plans)
    if len(plans) not in (1, samples):
        raise InputError(
            f"{len(plans)} plans for graphs that take {samples}: compile with "
            f"options={{'samples': {len(plans)}}}"
        )
    return plans


def _lanes(act: LayerGroup, kind: str, total: int) -> list[int]:
    """Lanes that a layer keeps of its heads or its MLP."""
    if not act.on:
        return []
    runs = act.heads if kind == "heads" else act.mlp
    if runs is None:
        return list(range(total))
    return [lane for start, stop in runs for lane in range(start, stop)]


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
        and all(isinstance(linear.module, nn.Linear) for linear in site.linears)
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
