"""Whose graph is it: from the parameters of a captured graph to the model that is being called."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from torch import fx, nn
from torch._C._dynamo.eval_frame import _PyInterpreterFrame

__all__ = ["language_model", "owner_of"]


def language_model(module: nn.Module) -> nn.Module | None:
    """The outermost transformers model in a module that has a decoder, None without one.

    Args:
        module: a model, what ``torch.compile`` made of it, or a module that holds it.
    """
    return next(_language_models(module), None)


def owner_of(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> nn.Module | None:
    """The model whose call is being compiled.

    TorchDynamo hands a backend parameters, not their model. That stands on the call stack, in the
    frames that called it or in the one being compiled; of the models there the outermost one that
    owns the graph's parameters is meant, since a graph break leaves inner modules to be compiled by
    themselves.
    """
    parameters = {id(value) for value in example_inputs if isinstance(value, nn.Parameter)}
    parameters |= {id(parameter) for parameter in graph_module.parameters()}
    if not parameters:
        return None
    seen: set[int] = set()
    for root in reversed(list(_modules_on_the_stack())):
        if id(root) in seen:
            continue
        seen.add(id(root))
        for model in _language_models(root):
            if any(id(parameter) in parameters for parameter in model.parameters()):
                return model
    return None


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


def _language_models(module: nn.Module) -> Iterator[nn.Module]:
    for inner in getattr(module, "_orig_mod", module).modules():
        if getattr(inner, "config", None) is not None and callable(
            getattr(inner, "get_decoder", None)
        ):
            yield inner
