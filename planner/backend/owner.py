"""Whose graph is it: from the parameters of a captured graph to the model that is being called."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType

from torch import fx, nn
from torch._C._dynamo.eval_frame import _PyInterpreterFrame

from planner.ir.errors import InputError
from planner.models.running.session import language_models


def owner_of(parameters: Iterable[nn.Parameter]) -> nn.Module | None:
    """The model whose call is being compiled, or is made; None where none is.

    Raises InputError: there are two, of which a graph could obey the plans of one alone.

    TorchDynamo hands a backend parameters, not their model. That stands on the call stack, in the
    frames that called it or in the one being compiled; of the models there the outermost one that
    owns the parameters is meant, since a graph break leaves inner modules to be compiled by
    themselves.
    """
    wanted = {id(parameter) for parameter in parameters}
    seen: set[int] = set()
    owner: nn.Module | None = None
    inside: set[int] = set()  # modules of the owner
    for root in reversed(list(_modules_on_the_stack())) if wanted else ():
        if id(root) in seen:
            continue
        seen.add(id(root))
        for model in language_models(root):
            if id(model) in inside:
                continue
            owned = {id(parameter) for parameter in model.parameters()} & wanted
            modules = {id(module) for module in model.modules()}
            if not owned:
                continue
            if owner is None or id(owner) in modules:
                owner, inside = model, modules
            elif owned - {id(parameter) for parameter in owner.parameters()}:
                raise InputError(
                    f"a graph calls two language models, {type(owner).__name__} and "
                    f"{type(model).__name__}: compile each by itself, so that each has a budget"
                )
    return owner


def _modules_on_the_stack() -> Iterator[nn.Module]:
    """Modules held by local variables, the innermost frame first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        for value in list(frame.f_locals.values()):
            # The frame that is being compiled has not begun to run: TorchDynamo holds it.
            held = value.f_locals.values() if isinstance(value, _PyInterpreterFrame) else (value,)
            for module in held:
                if isinstance(module, nn.Module) and not isinstance(module, fx.GraphModule):
                    yield module
        frame = frame.f_back
