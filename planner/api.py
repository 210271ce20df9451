"""Running models under budgets from Python.

    model = planner.compile(model, budget=0.65)
    model.generate(**inputs)
    with planner.budget(model, 0.5):
        model.generate(**inputs)

The model is the one passed in, obeying a plan; `restore` gives it back exactly as it was.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.structure import without_sites
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.compiler import pose
from planner.planning.figures import check_figures
from planner.planning.request import Request
from planner.planning.utilities import OF_WEIGHTS
from planner.progress import Progress, progress_bar

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from planner.ir.cost import Workload
    from planner.models.recovery.oneshot import Oneshot
    from planner.models.running.planning import Planning
    from planner.models.running.session import Override, Session

Model = TypeVar("Model", bound="nn.Module")

_log = logging.getLogger("planner")


def compile(
    model: Model,
    budget: Any = 0.65,
    *,
    plan: Plan | None = None,
    freeze: bool = False,
    kernels: str = "auto",
    recover: str = "",
    inputs: Any = None,
    processor: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Model:
    """Make a stock transformers model obey a budget; returns the same model.

    What switches are worth is measured, once per weights: it takes about a minute, is kept in the
    user's cache folder, and is left out with other `utilities` than ``auto``. With a `plan` it
    waits for the first budget that `planner.budget` is given.

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
        recover: ``refit`` writes weights into the model that make up for what this plan removes
            (`planner.models.recovery.refit`); `restore` puts the old ones back. ``compensate``
            makes up for less, under whatever plans `planner.budget` sets
            (`planner.models.recovery.compensation`).
        inputs: to calibrate on, as for `oneshot`; by default built-in ones.
        processor: of an image-text model, to read and to make inputs.
        progress: called with the number of measurements done, and of all; by default a bar on
            stderr says, where that is a terminal.
        options: the other fields of `planner.planning.request.Request`.

    Raises:
        InputError: for a bad budget, plan or option; the model is left as it was.
    """
    from planner.kernels.choice import Kernels
    from planner.models.recovery.oneshot import samples_of
    from planner.models.recovery.recovering import Measuring, Recovering, measurable
    from planner.models.running.planning import Planning
    from planner.models.running.saving import save_plans_of
    from planner.models.running.session import Session, check_recovered, stock_copy
    from planner.models.running.skipping import session_on

    unknown = set(options) - set(Request.__dataclass_fields__) | {"model", "budget"} & set(options)
    if unknown:
        known = sorted(set(Request.__dataclass_fields__) - {"model", "budget"})
        raise InputError(f"unknown option '{min(unknown)}': choose from {', '.join(known)}")
    is_new = Session.of(model) is None
    session = session_on(model, freeze=freeze, kernels=Kernels.of(kernels))
    try:
        refused = session.implementation.preparing.refused()
        if refused:
            _log.warning("some heads and MLPs stay whole: %s", next(iter(refused.values())))
        graph = without_sites(session.graph, refused)
        request = measurable(Request(graph.name, **options), session)
        wanted = budget if plan is None else plan
        if plan is not None:
            check_figures(plan, session.graph)
        bar = progress_bar("measure what switches are worth", sys.stderr.isatty())
        with nullcontext(progress) if progress else bar as shown:
            stock = stock_copy(session)
            samples = samples_of(stock, processor, inputs, recover)
            recovering = Recovering(stock, graph, recover, samples, processor, shown)
            if not isinstance(wanted, Plan) and request.utilities in OF_WEIGHTS:
                # What is wrong with the request comes up before a minute of measuring.
                pose(graph, replace(request, budget=wanted, utilities="prior"))
                request = replace(request, utilities=recovering.utilities(request).path)
            planning = Planning(graph, request, Measuring(session, samples, processor))
            chosen = planning.plan(wanted)
            weights = recovering.weights(chosen)
            means = recovering.means() if recover == "compensate" else {}
        if recover != "refit":
            check_recovered([chosen])
        asked = None if isinstance(wanted, Plan) or weights else Budget.of(wanted)
        _obey(session, planning, chosen, weights, asked)
        if means:
            _compensate(session, means)
    except BaseException:
        if is_new:
            session.close()
        raise
    save_plans_of(model)
    return model


def load(
    folder: str | Path, *, device: str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """Load what `save_pretrained` of a planned model wrote: the model, obeying its plan again.

    Utilities come with it, so `budget` makes the plans that it made before, and the means of
    ``recover="compensate"``. Where adapters (peft) were saved, their base model is loaded first,
    from where their config says. The model is in evaluation mode, in the precision of the file.
    InputError where no plan was saved there, it is broken, or it is of another model.
    """
    from planner.loading import load_weights
    from planner.models.running.saving import read_saved

    saved = read_saved(Path(folder))
    model = load_weights(Path(folder), device, trust_remote_code)
    # Weights that were refitted for the plan are in the file.
    plans = [replace(plan, provenance=_without_refit(plan.provenance)) for plan in saved.plans]
    compile(model, plan=plans[0], **saved.options)
    session = _session_of(model)
    if saved.means:
        _compensate(session, saved.means)
    if len(saved.plans) > 1:
        session.obey(plans)
    elif saved.budget is not None and session.planning is not None:
        _obey(session, session.planning, plans[0], {}, saved.budget)
    return model


def _compensate(session: Session, means: Mapping[str, Tensor]) -> None:
    """Have whatever plans hold make up, by means, for what they leave out."""
    from planner.models.recovery.compensation import compensated

    products = session.implementation.preparing.products
    session.implementation.use(compensated(products, session.layers, means))


def _without_refit(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in provenance.items() if (name, v) != ("recover", "refit")}


def _obey(
    session: Session,
    planning: Planning,
    plan: Plan,
    weights: Mapping[str, Tensor],
    asked: Budget | None = None,
) -> None:
    """Have a plan, or the budget that it is for, hold, with weights that were recovered for it."""
    from planner.models.recovery import exchange

    session.obey(plan, asked)
    session.planning = planning
    if asked is not None:
        session.implementation.prepare(planning.graph)
    exchange(session.model, session.before)
    session.before = exchange(session.model, weights)


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

    session, known = Session.of(model), language_model(model)
    if session is not None and session.obstacle:
        raise InputError(f"no plan can be obeyed: {session.obstacle}")
    _check_generate(session, known)
    if known is not None and (session is None or session.implementation is None) and _awaits(model):
        from planner.backend.compile_options import check_budget

        check_budget(value)
        return Override(session or Session(known), Setting((), asked=value))
    session = _session_of(model)
    return Override(session, session.asking(value))


def _check_generate(session: Session | None, model: nn.Module | None) -> None:
    """Raise InputError for a model that is compiled in place, and generates by a part that is not.

    So do BLIP-2 and InstructBLIP, whose `generate` calls that of their language model.
    """
    from transformers import GenerationMixin

    if model is None or model._compiled_call_impl is None:
        return
    made = None if session is None else session.implementation
    if made is not None and made.goes_with_copies:
        return
    stock = getattr(type(model), "generate", None) is GenerationMixin.generate
    for path, inner in () if stock else model.named_modules():
        if path and isinstance(inner, GenerationMixin) and inner._compiled_call_impl is None:
            raise InputError(
                f"{type(model).__name__}.generate calls its '{path}', which is not compiled: call "
                f"model.{path}.compile(backend='planner', options=...) too, with the same options"
            )


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
    """The plan that a compiled model obeys here; a tuple where samples have their own.

    Other threads and tasks may have other plans. Under a budget it is the plan of the last prompt
    that was read here, and before the first the plan for the workload that `compile` was told of.
    """
    session = _session_of(model)
    _check_generate(session, session.model)
    plans = session.plans
    return plans[0] if len(plans) == 1 else plans or None


def cost_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What a compiled model's next call on some inputs costs.

    Args:
        model: that `compile` was given.
        inputs: keyword arguments of its ``forward``, as a processor gives them. What runs in front
            of the decoder is run, to count what it costs.

    Returns:
        ``flops`` (of the prompt's pass) and ``kv`` (bytes once the tokens are generated that
        `compile` was told of) -> ``{"plan", "base", "fraction"}``. Where samples have plans of
        their own, it is their sum.

    Raises:
        InputError: the budget cannot be met on this prompt.
    """
    from planner.planning.plan_costs import PlanCosts

    session, prompt = _session_of(model), prompt_of(model, inputs)
    return PlanCosts(session.graph, prompt).of_all(session.plans_on(prompt))


def prompt_of(model: nn.Module, inputs: Mapping[str, Any]) -> Workload:
    """The sizes of a prompt, as `cost_of` takes it."""
    prompt: Workload = _session_of(model).implementation.prompt_of(inputs)
    return prompt


def graph_of(model: nn.Module) -> Graph:
    """The Graph of a compiled model."""
    return _session_of(model).graph


def kept_image_tokens(model: nn.Module) -> dict[int, list[int]]:
    """How many image tokens the plan that is active here kept of its last prompt.

    Layer of a token stage -> what was left behind it, one number a sample (a row of the batch).
    Empty before the first prompt, and where no token is dropped.
    """
    kept: dict[int, list[int]] = _session_of(model).implementation.kept_image_tokens
    return kept


def oneshot(
    model: Any,
    inputs: Any = None,
    budget: Any = 0.65,
    *,
    recover: str = "refit",
    output_dir: str | Path | None = None,
    ignore: Sequence[str] = (),
    processor: Any = None,
    **options: Any,
) -> Oneshot:
    """Calibrate a model on data, plan it under a budget, recover what that loses, and export it.

    Args:
        model: a transformers model with weights, or a name that `planner.loading.load_model` takes.
        inputs: a folder of pictures, a text file, or a list of what the model is called with, one
            row each. None for built-in ones.
        budget: as in `planner.compile`.
        recover: ``refit`` for least squares, "" for nothing.
        output_dir: a new folder for the checkpoint. Without one the model itself obeys the plan, as
            after `planner.compile`, and has the recovered weights.
        ignore: names of layers, heads and MLPs that stay whole, such as ``layer.0``, ``heads.3``.
        processor: of the model; loaded with it where the model is a name.
        options: the other fields of `planner.planning.request.Request`.

    Raises:
        InputError: for anything wrong with the arguments.
    """
    from planner.loading import load_model
    from planner.models.recovery.oneshot import oneshot_on, samples_of
    from planner.models.recovery.recovering import Recovering
    from planner.models.running.planning import Planning
    from planner.models.running.session import Session, stock_copy
    from planner.models.running.skipping import session_on

    companions = None
    if isinstance(model, str | Path):
        model, processor, source = load_model(str(model))
        companions = source.folder
    is_new = Session.of(model) is None
    session = session_on(model)
    keeps = False
    try:
        graph = without_sites(session.graph, session.implementation.preparing.refused())
        request = Request(graph.name, budget, keep=tuple(ignore), **options)
        folder = None if output_dir is None else Path(output_dir)
        bar = progress_bar("calibrate", sys.stderr.isatty())
        with bar as shown:
            stock = stock_copy(session)
            samples = samples_of(stock, processor, inputs, recover)
            recovering = Recovering(stock, graph, recover, samples, processor, shown)
            done = oneshot_on(recovering, request, folder, companions)
        if folder is None:
            if done.measured is not None:
                request = replace(request, utilities=done.measured.path)
            _obey(session, Planning(graph, request), done.compiled.plan, done.weights)
            keeps = True
    finally:
        if is_new and not keeps:
            session.close()
    return done


def question(asked: str | Sequence[str]) -> AbstractContextManager[None]:
    """Say, for a ``with`` block, what is asked about the images of the calls inside.

    For selectors that compare images with the question, such as ``trim`` and ``cdpruner``: the
    question alone, without a chat template, or one for each image of a batch.
    """
    from planner.models.tokens.text_tower import question as said

    return said(asked)


def restore(model: Model) -> Model:
    """Give the model back exactly as it was before `compile`, for all threads and tasks."""
    from planner.models.running.saving import save_no_plans_of

    _session_of(model).close()
    save_no_plans_of(model)
    return model


def _session_of(model: nn.Module) -> Session:
    from planner.models.running.session import Session, language_model

    session = Session.of(model)
    if language_model(model) is None:
        raise InputError(
            f"this {type(model).__name__} holds no language model of transformers: it has nothing "
            "to budget"
        )
    if session is not None and session.obstacle:
        raise InputError(f"no plan is obeyed: {session.obstacle}")
    waits = session is not None and session.setting is not None and _awaits(model)
    if session is None or (session.implementation is None and not waits):
        raise InputError(
            f"this {type(model).__name__} is not compiled: call planner.compile(model), or "
            "torch.compile it with backend='planner' and call it once"
        )
    session.check_copy(language_model(model))
    return session
