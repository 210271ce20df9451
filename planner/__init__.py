"""planner: a compiler for adaptive multimodal inference.

Importing this package is cheap on purpose: torch and transformers are loaded by the functions
that need them, so that ``planner --help`` and a cached ``planner compile`` start at once.

    ir/        from a model to a Graph of its operators, and what they cost
    solver/    from a Problem to the best choice, with a proof
    plan       the Plan: which switches stay on
    schedule   the Schedule: a budget, and the scheduler that makes plans for it
    planning/  from a Graph and a budget to a Plan
    audit/     labels held against proven optima
    loading    models with their weights, processors, pictures
    kernels/   Triton kernels of what a plan keeps
    models/    stock models that obey plans, or a scheduler
    training/  what is learned
    api        models under budgets, from Python
    serving/   the same over HTTP
    backend/   the same inside torch.compile
    cli/       the command line
    integrations/  planned models in evaluation harnesses and transformers' server
    aliases/   configs of the models that have a short name
    files, documents, arrays   files, YAML and JSON, NumPy archives, read within limits
    progress   a bar on stderr
    spread, ray_workers        work on many items, in this process or on a Ray cluster
    contained  code that comes with a model, run within limits
    cpu        which CPU this is
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.api import budget, compile, cost_of, load, oneshot, plan_of, question, restore
    from planner.plan import Plan, load_plan, save_plan

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "__version__",
    "budget",
    "compile",
    "cost_of",
    "load",
    "load_plan",
    "oneshot",
    "plan_of",
    "question",
    "restore",
    "save_plan",
]


def __getattr__(name: str) -> Any:
    # Imported on first use.
    if name in __all__:
        of_plan = name in ("Plan", "load_plan", "save_plan")
        return getattr(import_module("planner.plan" if of_plan else "planner.api"), name)
    raise AttributeError(f"module 'planner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
