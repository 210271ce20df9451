"""The torch.compile backend: a stock model obeys plans inside a compiled graph.

    model = torch.compile(model, backend="planner", options={"budget": 0.65})
    planner.set_budget(model, 0.5)  # data, not code: nothing is compiled again

Enters: a graph that TorchDynamo captured. Its blocks are found through the sites of the model's
own Graph, lowered as ``planner compile`` does (`blocks`), and rewritten into planner's custom ops
(`rewriting`); which units survive is read from buffers that belong to the model (`board`). What is
left goes to inductor, and so does the graph as it was: that one runs while plans leave nothing out.
Graphs without a block that planner knows are inductor's alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from planner.backend.board import Board, board_of, forget_boards
from planner.backend.options import Options
from planner.backend.owner import language_model, owner_of
from planner.backend.rewriting import rewritten
from planner.ir.errors import InputError
from planner.ir.lowering import NotLowered
from planner.plan import Plan

__all__ = ["compile_graph", "set_budget"]

_log = logging.getLogger("planner")
_told: set[str] = set()


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point that ``torch.compile(..., backend="planner")`` calls for every graph.

    Args:
        graph_module: as TorchDynamo captured it.
        example_inputs: what it was captured with, parameters among them.
        options: see `planner.backend.options.Options`.
        mode: of ``torch.compile``; inductor's.

    Raises:
        InputError: an unknown option, or a budget that cannot be met.
    """
    chosen = Options.parse(options, mode)
    compiler: Callable[..., Callable[..., Any]] = chosen.inner_compiler()
    model = owner_of(graph_module, example_inputs)
    if model is None:
        if any(isinstance(value, nn.Parameter) for value in example_inputs):
            _tell_once("a graph belongs to no language model of transformers; inductor compiles it")
    elif _adopted(board := board_of(model), model, chosen):
        narrowed, notes = rewritten(graph_module, example_inputs, board)
        for note in notes:
            _tell_once(note)
        if narrowed is not None:
            return _by_board(
                board, compiler(graph_module, example_inputs), compiler(narrowed, example_inputs)
            )
    return compiler(graph_module, example_inputs)


def set_budget(model: nn.Module, value: Any) -> tuple[Plan, ...]:
    """Make a model compiled with ``backend="planner"`` obey another budget; compiles nothing.

    Args:
        model: what ``torch.compile`` was given or gave back.
        value: a budget as in `planner.compile`, a Plan, or a list of Plans, one per sample, where
            the option ``samples`` says how many a batch has.

    Returns:
        The plans obeyed from now on. Empty before the model is first called, since only that call
        knows the options; the value is then taken up by it.

    Raises:
        InputError: for a bad budget or plan; what was obeyed before still is.
    """
    known = language_model(model)
    if known is None:
        raise InputError(
            f"this {type(model).__name__} holds no language model of transformers: "
            "it has nothing to budget"
        )
    return board_of(known).ask(value)


def _by_board(
    board: Board, dense: Callable[..., Any], narrowed: Callable[..., Any]
) -> Callable[..., Any]:
    """Which of two compiled graphs runs is asked at every call, and needs no device to answer."""

    def run(*inputs: Any) -> Any:
        return dense(*inputs) if board.dense else narrowed(*inputs)

    return run


def _adopted(board: Board, model: nn.Module, options: Options) -> bool:
    """Whether the model can be lowered; plans are made then."""
    try:
        board.adopt(model, options)
    except NotLowered as why:
        _tell_once(f"{type(model).__name__} runs dense: {why}")
        return False
    return True


def _reset() -> None:
    """What ``torch.compiler.reset()`` calls: options, budgets and what was told are forgotten."""
    forget_boards()
    _told.clear()


compile_graph.reset = _reset  # type: ignore[attr-defined]


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        _log.warning("%s", message)
