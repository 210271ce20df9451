"""Running models under budgets from Python.

    model = planner.compile(model, budget=0.65)
    model.generate(**inputs)
    with planner.budget(model, 0.5):
        model.generate(**inputs)

The model is the one passed in, obeying a plan; `restore` gives it back exactly as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.structure import without_sites
from planner.plan import Plan
from planner.planning.compiler import Request
from planner.planning.figures import check_figures

if TYPE_CHECKING:
    from torch import nn

    from planner.models.running.session import Override, Session

Model = TypeVar("Model", bound="nn.Module")


def compile(
    model: Model,
    budget: Any = 0.65,
    *,
    plan: Plan | None = None,
    freeze: bool = False,
    kernels: str = "auto",
    **options: Any,
) -> Model:
    """Make a stock transformers model obey a budget; returns the same model.

    The plan holds in all threads and tasks, and ends what `planner.budget` has set before.

    Args:
        model: an image-text-to-text or causal language model with weights, or what wraps it
            (PeftModel, DistributedDataParallel).
        budget: a fraction, a limit such as ``"kv=256MiB"``, or several
            (`planner.planning.budgets`).
        plan: a plan to obey instead, as loaded by `planner.plan.load_plan`.
        freeze: promise that weights stay as they are. Kept rows and columns of plans that run again
            are then copied together, which saves 5 to 15 % of a product's time. By default nothing
            is copied, and the plan follows the weights whichever way they change.
        kernels: who computes: ``triton``, planner's kernels (on a CPU interpreted, for tests);
            ``torch``; or ``auto``, by operator whoever the cost model expects to be faster, and
            PyTorch on a CPU (`planner.kernels.choice`).
        options: the other fields of `planner.planning.compiler.Request`: switches, utilities,
            device,
            image_tokens, text_tokens, new_tokens, batch, ...

    Raises:
        InputError: for a bad budget, plan or option; the model is left as it was.
    """
    from planner.kernels.choice import Kernels
    from planner.models.running.planning import Planning
    from planner.models.running.session import Session
    from planner.models.running.skipping import session_on

    unknown = set(options) - set(Request.__dataclass_fields__) | {"model", "budget"} & set(options)
    if unknown:
        known = sorted(set(Request.__dataclass_fields__) - {"model", "budget"})
        raise InputError(f"unknown option '{min(unknown)}': choose from {', '.join(known)}")
    is_new = Session.of(model) is None
    session = session_on(model, freeze=freeze, kernels=Kernels.of(kernels))
    try:
        graph = without_sites(session.graph, session.implementation.preparing.refused())
        planning = Planning(graph, Request(graph.name, **options))
        if plan is not None:
            check_figures(plan, session.graph)
        session.obey(planning.plan(plan if plan is not None else budget))
        session.planning = planning
    except BaseException:
        if is_new:
            session.close()
        raise
    return model


def budget(model: nn.Module, value: Any) -> Override:
    """Have another budget hold: from now on, or for a ``with`` block; nothing is rebuilt.

    It holds in this thread or task, and in those that it starts from then on; others keep theirs.
    Blocks nest, and leaving one puts back what held before, whatever the order of leaving.

    Args:
        model: that `planner.compile` or ``torch.compile(..., backend="planner")`` was given, or
            gave back.
        value: a budget as in `planner.compile`, a Plan, or a list of Plans, one per sample of the
            batches to come.

    Returns:
        What a ``with`` statement takes, and yields the plan of; it is also the attribute ``plan``.
        Before the first call of a model that torch.compile compiles there is no plan yet, since
        only that call knows the options: None.

    Raises:
        InputError: for a bad budget or plan; what held before still does.
    """
    from planner.models.running.session import Override, Session, Setting, language_model

    session = Session.of(model)
    if session is not None and session.obstacle:
        raise InputError(f"no plan can be obeyed: {session.obstacle}")
    known = language_model(model)
    if known is not None and (session is None or session.planning is None) and _awaits(model):
        from planner.backend.compile_options import check_budget

        check_budget(value)
        return Override(session or Session(known), Setting((), asked=value))
    session = _session_of(model)
    return Override(session, Setting(session.planned(value)))


def _awaits(model: nn.Module) -> bool:
    """Whether the first call of a compiled model will say how plans are made."""
    import torch

    if model._compiled_call_impl is not None:
        return True
    if not isinstance(model, torch._dynamo.OptimizedModule):
        return False
    callback: Any = model.dynamo_ctx.callback
    backend = torch._dynamo.eval_frame.innermost_backend(callback)
    return getattr(backend, "compiler_name", "planner") == "planner"


def plan_of(model: nn.Module) -> Any:
    """The plan that a compiled model's next call obeys here; a tuple where samples have their own.

    Other threads and tasks may have other plans.
    """
    setting = _session_of(model).setting
    return None if setting is None else setting.plan


def graph_of(model: nn.Module) -> Graph:
    """The Graph of a compiled model."""
    return _session_of(model).graph


def kept_image_tokens(model: nn.Module) -> dict[int, list[int]]:
    """How many image tokens the plan that is active here kept of its last prompt.

    Returns:
        Layer of a token stage -> what was left behind it, one number a sample (a row of the batch).
        Empty before the first prompt, and where no token is dropped.
    """
    kept: dict[int, list[int]] = _session_of(model).implementation.kept_image_tokens
    return kept


def restore(model: Model) -> Model:
    """Give the model back exactly as it was before `compile`, for all threads and tasks."""
    _session_of(model).close()
    return model


def _session_of(model: nn.Module) -> Session:
    from planner.models.running.session import Session, language_model

    session = Session.of(model)
    if language_model(model) is None:
        raise InputError(
            f"this {type(model).__name__} holds no language model of transformers: it has nothing "
            "to budget"
        )
    if session is None or (session.planning is None and session.setting is None):
        raise InputError(
            f"this {type(model).__name__} is not compiled: call planner.compile(model), or "
            "torch.compile it with backend='planner' and call it once"
        )
    return session
