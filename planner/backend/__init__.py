"""The torch.compile backend: a stock model obeys plans inside a compiled graph.

    model = torch.compile(model, backend="planner", options={"budget": 0.65})
    planner.budget(model, 0.5)  # data, not code: nothing is compiled again

Enters: a graph that TorchDynamo captured. Its blocks are found through the sites of the model's
own Graph, lowered as ``planner compile`` does (`blocks`), and rewritten into planner's custom ops
(`rewriting`); which units survive are tensors that the graph is given at every call, those of the
plan that holds where the call is made (`plan_tensors`). What is left goes to inductor, and so does
the graph as it was: that one runs while plans leave nothing out. Graphs without a block that
planner knows are inductor's alone.

    compile_options   what torch.compile's ``options`` may hold
    owner             whose parameters a graph reads
    blocks            attention blocks and MLPs of a captured graph
    vanishing         layers that can be left out by leaving out both
    rewriting         blocks -> planner's ops
    captured_prompts  prompts among the inputs of a captured graph
    plan_tensors      plans as tensors
    recompiling       TorchDynamo's limit, beyond which nothing obeys
    captured_sites    which of a model's sites a call of a captured graph computes
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.utils.weak import WeakIdKeyDictionary

from planner.backend.captured_prompts import Places, begin, places_of, program_of
from planner.backend.captured_sites import CapturedSites
from planner.backend.compile_options import Options
from planner.backend.owner import owner_of
from planner.backend.plan_tensors import PlanTensors, adopted, forget, is_let_go, refuse
from planner.backend.recompiling import watch
from planner.backend.rewriting import Rewritten, rewritten
from planner.ir.errors import InputError
from planner.ir.lowering import NotLowered
from planner.models.running.session import ATTRIBUTE, Session, Setting
from planner.plan import Plan

__all__ = ["compile_graph"]

_log = logging.getLogger("planner")


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point that ``torch.compile(..., backend="planner")`` calls for every graph.

    Example inputs have parameters among them; `options` are those of
    `planner.backend.compile_options.Options`, `mode` is inductor's. InputError for an unknown
    option, a budget that cannot be met, or a model that `planner.compile` has.
    """
    chosen = Options.parse(options, mode)
    compiler: Callable[..., Callable[..., Any]] = chosen.inner_compiler()
    parameters = {n: v for n, v in enumerate(example_inputs) if isinstance(v, nn.Parameter)}
    model = owner_of([*parameters.values(), *graph_module.parameters()])
    session = None
    if model is not None:
        session = _adopted(model, chosen)
    elif parameters:
        _tell_once("a graph belongs to no language model of transformers; inductor compiles it")
    dense = compiler(graph_module, example_inputs)
    if session is None or session.obstacle:
        return dense
    owned = {id(parameter) for parameter in session.model.parameters()}
    places = places_of(graph_module, session.model)
    place = next((n for n, value in parameters.items() if id(value) in owned), None)
    found = rewritten(graph_module, example_inputs, session.implementation)
    for note in found.masked:
        _tell_once(note)
    if found.whole and not session.implementation.obeys and session.setting is session.default:
        # Nobody has set a budget yet, and none can be from here on: better no plan than one that
        # is obeyed in part.
        why = next(iter(found.whole.values()))
        refuse(session, f"{type(session.model).__name__} runs dense: {why}")
        session.begin_anew(None)
        _tell_once(session.obstacle)
        return dense
    narrowed: Callable[..., Any] | None = None
    if found.graph is not None:
        session.implementation.obeys = True
        tensors = _examples(found, found.graph, session, example_inputs)
        narrowed = compiler(found.graph, [*example_inputs, *tensors])
    weights = {n for n, value in parameters.items() if value.ndim == 2} | found.places.keys()
    sites = CapturedSites(tuple(sorted(weights)), found.places, found.whole, found.tensors)
    return _by_plan(_Owner(session, chosen, place), places, dense, narrowed, sites)


def _examples(
    found: Rewritten, graph: fx.GraphModule, session: Session, example_inputs: Sequence[Any]
) -> list[Any]:
    """What a rewritten graph is compiled with, in addition to what it was captured with."""
    plans = session.implementation
    program = session.program_of(Setting((Plan.of(session.graph),)))
    tensors: list[Any] = plans.of(program, found.tensors)
    fake = detect_fake_mode(example_inputs)
    if fake is None:
        return tensors
    examples = [fake.from_tensor(tensor, static_shapes=True) for tensor in tensors]
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, example in zip(nodes[-len(examples) :], examples, strict=True):
        node.meta["example_value"] = example
    return examples


class _Owner:
    """Says whose call of a captured graph this is.

    The graph was captured from the session's model; other models of its class that share it are
    adopted with the same options. `place`: where among its inputs a parameter says whose call it
    is; None where the graph holds the parameters of one model.
    """

    def __init__(self, session: Session, options: Options, place: int | None) -> None:
        self._model, self._options, self._place = weakref.ref(session.model), options, place
        self._sessions: Any = WeakIdKeyDictionary()

    def of(self, inputs: Sequence[Any]) -> Session | None:
        """The session of the model that calls; None where it obeys nothing."""
        if self._place is None:
            model = self._model()
            session = None if model is None else _adopted(model, self._options)
        else:
            parameter = inputs[self._place]
            known = self._sessions.get(parameter)
            session = None if known is None else known()
            if session is None or session.model.__dict__.get(ATTRIBUTE) is not session:
                session = _adopted(self._model_with(parameter), self._options)
                if session is not None:
                    self._sessions[parameter] = weakref.ref(session)
        obeys = session is not None and isinstance(session.implementation, PlanTensors)
        return session if obeys else None

    def _model_with(self, parameter: nn.Parameter) -> nn.Module:
        """The model that was captured, or another that is being called; InputError for none."""
        first = self._model()
        if first is not None and any(own is parameter for own in first.parameters()):
            return first
        model = owner_of([parameter])
        if model is None:
            raise InputError(
                "no plan can be obeyed: this graph was compiled for another model, and the one it "
                "is called for is no local variable of any caller"
            )
        return model


def _by_plan(
    owner: _Owner,
    places: Places | None,
    dense: Callable[..., Any],
    narrowed: Callable[..., Any] | None,
    captured: CapturedSites,
) -> Callable[..., Any]:
    """What runs instead of a captured graph: that graph itself, or the one that obeys plans, which
    is given the plan's tensors; which of both is known without a device.

    `places` are those of the prompt, where the graph begins one. It raises InputError where it
    cannot do what the plan says.
    """

    def run(*inputs: Any) -> Any:
        mine = owner.of(inputs)
        if mine is None:
            return dense(*inputs)
        plans = mine.implementation
        changed = plans.changed_since
        if changed and mine.setting is not None:
            raise InputError(f"the plan cannot be obeyed: {changed}")
        if places is not None:
            begin(mine, places, inputs)
        program = program_of(mine)
        left_out: frozenset[str] = frozenset() if program is None else plans.narrowed(program)
        if not left_out:
            return dense(*inputs)
        sites = captured.here(plans, inputs)
        for name in left_out & sites.whole.keys():
            raise InputError(
                f"the plan cannot be obeyed: it narrows {name}, but {sites.whole[name]}"
            )
        if narrowed is None or not sites.fits:
            return dense(*inputs)
        return narrowed(*inputs, *plans.of(program, sites.tensors))

    return run


def _adopted(model: nn.Module, options: Options) -> Session | None:
    """The session of a model that plans are made for; None where it cannot be lowered, or
    `planner.restore` has let go of it and nobody has set a budget since.
    """
    session = Session.of(model)
    waiting = session is not None and session.setting is not None
    if session is not None and session.obstacle:
        if waiting:
            raise InputError(f"no plan can be obeyed: {session.obstacle}")
        return None
    if is_let_go(model) and not waiting:
        return None
    try:
        return adopted(model, options)
    except NotLowered as why:
        _tell_once(f"{type(model).__name__} runs dense: {why}")
        return None


def _reset() -> None:
    """What ``torch.compiler.reset()`` calls: options, budgets and what was told are forgotten."""
    forget()
    _tell_once.cache_clear()


watch()
compile_graph.reset = _reset  # type: ignore[attr-defined]


@cache
def _tell_once(message: str) -> None:
    _log.warning("%s", message)
