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
    rewriting         blocks -> planner's ops
    captured_prompts  prompts among the inputs of a captured graph
    plan_tensors      plans as tensors
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
from planner.backend.compile_options import Options
from planner.backend.owner import owner_of
from planner.backend.plan_tensors import PlanTensors, adopted, forget
from planner.backend.rewriting import Rewritten, rewritten
from planner.ir.lowering import NotLowered
from planner.models.running.session import Session

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
    session, found, place, places = None, None, None, places_of(graph_module)
    if model is not None:
        session = _adopted(model, chosen)
    elif parameters:
        _tell_once("a graph belongs to no language model of transformers; inductor compiles it")
    if session is not None:
        owned = {id(parameter) for parameter in session.model.parameters()}
        place = next((n for n, value in parameters.items() if id(value) in owned), None)
        found, masked, dense = rewritten(graph_module, example_inputs, session.implementation)
        for note in (*masked, *dense):
            _tell_once(note)
        if dense:
            # Better no plan than one that is obeyed in part.
            session.obstacle, found = dense[0], None
            session.begin_anew(None)
    compiled = narrowed = compiler(graph_module, example_inputs)
    if session is None or (found is None and places is None):
        return compiled
    if found is not None:
        tensors = _examples(found, session, example_inputs)
        narrowed = compiler(found.graph, [*example_inputs, *tensors])
    return _by_plan(_Owner(session, chosen, place), places, compiled, narrowed, found)


def _examples(found: Rewritten, session: Session, example_inputs: Sequence[Any]) -> list[Any]:
    """What a rewritten graph is compiled with, in addition to what it was captured with."""
    program = session.program
    assert program is not None
    tensors: list[Any] = session.implementation.of(program, found.tensors)
    fake = detect_fake_mode(example_inputs)
    if fake is None:
        return tensors
    examples = [fake.from_tensor(tensor, static_shapes=True) for tensor in tensors]
    nodes = [node for node in found.graph.graph.nodes if node.op == "placeholder"]
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
        self._first, self._options, self._place = weakref.ref(session), options, place
        self._sessions: Any = WeakIdKeyDictionary()

    def of(self, inputs: Sequence[Any]) -> Session | None:
        """The session of the model that calls; None where it obeys nothing."""
        if self._place is None:
            session = self._first()
        else:
            session = _session_of(inputs[self._place], self._sessions, self._options)
        obeys = session is not None and isinstance(session.implementation, PlanTensors)
        return session if obeys else None


def _by_plan(
    owner: _Owner,
    places: Places | None,
    dense: Callable[..., Any],
    narrowed: Callable[..., Any],
    found: Rewritten | None,
) -> Callable[..., Any]:
    """What runs instead of a captured graph: that graph itself, or the one that obeys plans, which
    is given what `found` says; which of both is known without a device.

    `places` are those of the prompt, where the graph begins one.
    """

    def run(*inputs: Any) -> Any:
        mine = owner.of(inputs)
        if mine is None:
            return dense(*inputs)
        if places is not None:
            begin(mine, places, inputs)
        program, plans = program_of(mine), mine.implementation
        if found is None or program is None or plans.is_dense(program):
            return dense(*inputs)
        return narrowed(*inputs, *plans.of(program, found.tensors))

    return run


def _session_of(parameter: nn.Parameter, sessions: Any, options: Options) -> Session | None:
    """The session of the model that a parameter belongs to; None where it was restored."""
    known = sessions.get(parameter)
    session: Session | None = None if known is None else known()
    if session is not None and session.model.__dict__.get("_planner_session") is session:
        return session
    model = owner_of([parameter])
    if model is None:
        return None
    session = Session.of(model)
    if known is None and (session is None or session.implementation is None):
        session = _adopted(model, options)
    sessions[parameter] = weakref.ref(session) if session is not None else _nothing
    return session


def _nothing() -> None:
    """Stands for the session of a model that cannot be lowered."""


def _adopted(model: nn.Module, options: Options) -> Session | None:
    """The session of a model that plans are made for; None where it cannot be lowered."""
    try:
        return adopted(model, options)
    except NotLowered as why:
        _tell_once(f"{type(model).__name__} runs dense: {why}")
        return None


def _reset() -> None:
    """What ``torch.compiler.reset()`` calls: options, budgets and what was told are forgotten."""
    forget()
    _tell_once.cache_clear()


compile_graph.reset = _reset  # type: ignore[attr-defined]


@cache
def _tell_once(message: str) -> None:
    _log.warning("%s", message)
