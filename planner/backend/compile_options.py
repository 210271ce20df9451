"""Options of the backend: ``torch.compile(model, backend="planner", options={...})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, cast

import torch

from planner.ir.errors import InputError
from planner.kernels.choice import Kernels
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.request import Request
from planner.planning.switches import AXES, SwitchSet

_SWITCHES = ",".join(axis for axis in AXES if axis != "tokens")
# What a loaded model has already, and what would change shapes and so the compiled graph.
_SETTLED = ("model", "trust_remote_code")
_SHAPES = {
    "tokens": "the torch.compile backend drops no image tokens, since that would change shapes; "
    "planner.compile does",
    "kv": "the torch.compile backend evicts nothing from the KV cache, since that would change "
    "shapes; planner.compile does",
}


@dataclass(frozen=True)
class Options:
    """What ``options=`` may hold."""

    # How plans are made; its fields (budget, switches, utilities, device, ...) are options of their
    # own. By default ``switches`` is ``layers,heads,mlp``.
    request: Request
    samples: int = 1  # plans that a batch carries: 1 for all of it, or one for each sample
    inner: str = "inductor"  # what compiles the rest; ``eager`` runs it as it is, to debug
    mode: str | None = None  # of inductor
    # Who computes planner's ops; ``auto`` is Triton on a GPU and PyTorch on a CPU.
    kernels: Kernels = Kernels.AUTO

    @staticmethod
    def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Check options by name and value; InputError says what an option may be."""
        if not isinstance(options, Mapping | None):
            raise InputError(
                f"options is {options!r}: give a dictionary such as {{'budget': 0.65}}"
            )
        given = dict(options or {})
        of_request = [f.name for f in fields(Request) if f.name not in (*_SETTLED, *_SHAPES)]
        known = [*of_request, "samples", "inner", "mode", "kernels"]
        for name in given:
            if name in _SHAPES:
                raise InputError(_SHAPES[name])
            if name not in known:
                close = get_close_matches(str(name), known, 1)
                hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(known)}"
                raise InputError(f"unknown option '{name}': {hint}")
        samples, inner = given.pop("samples", 1), given.pop("inner", "inductor")
        mode = given.pop("mode", mode)
        kernels = Kernels.of(given.pop("kernels", Kernels.AUTO))
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise InputError(f"option samples is {samples!r}: give a whole number from 1")
        if inner not in torch.compiler.list_backends(exclude_tags=()) or inner == "planner":
            raise InputError(
                f"option inner is {inner!r}: give another backend of torch.compile, "
                "such as inductor or eager"
            )
        modes = ["default", *torch._inductor.list_mode_options()]
        if mode is not None and mode not in modes:
            raise InputError(f"mode is {mode!r}: give one of inductor's, {', '.join(modes)}")
        given.setdefault("switches", _SWITCHES)
        if "tokens" in SwitchSet.parse(given["switches"]).axes:
            raise InputError(f"{_SHAPES['tokens']}; choose switches from {_SWITCHES}")
        request = Request("model", **given)
        check_budget(request.budget)
        return Options(request, samples, inner, mode, kernels)

    def inner_compiler(self) -> Callable[..., Any]:
        """What compiles a graph once its blocks are rewritten."""
        if self.inner == "inductor":
            inductor: Any = torch._TorchCompileInductorWrapper
            return cast(Callable[..., Any], inductor(self.mode, None, None))
        return cast(Callable[..., Any], torch._dynamo.lookup_backend(self.inner))


def check_budget(value: Any) -> None:
    """Raise InputError unless the value is a budget, a Plan or a list of Plans to be run here."""
    plans = [value] if isinstance(value, Plan) else value
    if not isinstance(plans, list | tuple) or not any(isinstance(p, Plan) for p in plans):
        Budget.of(value)
        return
    if not all(isinstance(plan, Plan) for plan in plans):
        raise InputError("a list of plans holds something else: give one Plan per sample")
    for field, reason in _SHAPES.items():
        if any(getattr(plan, field) for plan in plans):
            raise InputError(reason)
