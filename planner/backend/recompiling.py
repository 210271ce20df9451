"""TorchDynamo's limit of recompilations: beyond it code runs as plain Python, and obeys nothing.

All models of transformers share the code that calls them, and every way to call one (a mask or
none, labels, a cache), every class and every set of options counts, so that the default of 8 is
soon used up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo import convert_frame, eval_frame

from planner.ir.errors import InputError

# What the limit becomes where nobody has set it.
LIMIT = 64

_config: Any = torch._dynamo.config


def watch() -> None:
    """Raise the limit, where it is PyTorch's default, and have a model that passes it refused."""
    if _config._is_default("recompile_limit"):
        _config.recompile_limit = LIMIT
    compiling: Any = convert_frame
    if not hasattr(compiling.exceeds_recompile_limit, "by_planner"):
        compiling.exceeds_recompile_limit = _refusing(compiling.exceeds_recompile_limit)


def _refusing(exceeds: Callable[..., Any]) -> Callable[..., Any]:
    """TorchDynamo's own check, but for models that the backend ``planner`` compiles an error."""

    def check(*args: Any, **kwargs: Any) -> Any:
        exceeded, limit = exceeds(*args, **kwargs)
        if exceeded and _is_of_a_model(sys._getframe(1)):
            raise InputError(
                "no plan would be obeyed from here on, since the model was compiled for too many "
                f"ways to call it: set torch._dynamo.config.{limit} above {getattr(_config, limit)}"
            )
        return exceeded, limit

    check.by_planner = True  # type: ignore[attr-defined]
    return check


def _is_of_a_model(compiling: FrameType) -> bool:
    """Whether the code that TorchDynamo is about to compile calls modules, for this backend."""
    known = compiling.f_locals
    found: Any = known.get("compiler_fn")
    backend = eval_frame.innermost_backend(found)
    if getattr(backend, "compiler_name", None) != "planner":
        return False
    code, within = known.get("code"), known.get("globals", {})
    values = [*known.get("locals", {}).values(), *_cells(known.get("closure"))]
    values += [within.get(name) for name in getattr(code, "co_names", ())]
    values += [item for value in values if isinstance(value, tuple | list) for item in value]
    modules = [getattr(value, "__self__", value) for value in values]
    return any(isinstance(module, nn.Module) for module in modules)


def _cells(closure: Any) -> list[Any]:
    """What a closure holds."""
    found = []
    for cell in closure or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # nothing yet
            continue
    return found
