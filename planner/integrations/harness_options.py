"""Which of an evaluation harness's ``--model_args`` say how plans are made."""

from __future__ import annotations

from typing import Any

from planner.planning.request import Request

_OF_COMPILE = {"budget", "freeze", "kernels", "recover"}


def taken_out(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that `planner.compile` takes; they leave `arguments`.

    The harness's `device` and `batch` are its own: those of plans are ``plan_device`` and
    ``plan_batch``. Without a budget the model is whole.
    """
    named = {name: name for name in _OF_COMPILE | set(Request.__dataclass_fields__) - {"model"}}
    named |= {"plan_device": named.pop("device"), "plan_batch": named.pop("batch")}
    found = {field: arguments.pop(name) for name, field in named.items() if name in arguments}
    return {"budget": 1.0} | found
