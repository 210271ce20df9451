"""Whether a graph that torch.compile has traced runs the plan of the context that calls it.

Such a graph has one plan built in, and TorchDynamo's guards see what stands in the model, which is
the plan that was set last. A context that wants another one must not get its answer: so the graph
asks, by an operator that hands on the decoder's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from planner.ir.errors import InputError

# Ticket -> who says what the calling context wants, and what the graph runs.
_tickets: list[tuple[WeakMethod[Callable[[], object]], object]] = []


def ticket(wanted: Callable[[], object]) -> str:
    """What a graph that is being traced shows when it runs.

    The method `wanted` says what a context wants to run: here and now, what the graph runs.
    """
    mine = WeakMethod(wanted), wanted()
    if mine not in _tickets:
        _tickets.append(mine)
    return str(_tickets.index(mine))


def asked(
    args: tuple[Any, ...], kwargs: dict[str, Any], shown: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A decoder's arguments, one of which goes through the operator."""
    for name in ("inputs_embeds", "input_ids"):
        if isinstance(kwargs.get(name), Tensor):
            return args, {**kwargs, name: torch.ops.planner.in_context(kwargs[name], shown)}
    if args and isinstance(args[0], Tensor):
        return (torch.ops.planner.in_context(args[0], shown), *args[1:]), kwargs
    return args, kwargs


@torch.library.custom_op("planner::in_context", mutates_args=())
def _in_context(x: Tensor, shown: str) -> Tensor:
    """A copy of x; raises InputError unless the calling context wants what the graph runs."""
    method, runs = _tickets[int(shown)]
    wanted = method()
    if wanted is not None and wanted() != runs:
        raise InputError(
            "another thread or task has set the plan that this compiled model runs: torch.compile "
            "it with backend='planner', or call it as it is, for plans of one's own"
        )
    return x.clone()


@_in_context.register_fake
def _(x: Tensor, shown: str) -> Tensor:
    return torch.empty_like(x)


def _backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient, None


_in_context.register_autograd(_backward)
