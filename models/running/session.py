"""The session of a model: what planner knows of it, and which plans each execution context runs.

It is kept in the model's own ``__dict__``, so copies have sessions of their own, and a model that
nobody uses is freed with it. Which plans are active is state of the execution context (a thread, a
task): `Session.set` changes it for the calling context and for those it starts from then on.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.models.running.bindings import BoundLayer, bind
from planner.models.running.program import Program
from planner.plan import Plan
from planner.planning.budgets import Budget

if TYPE_CHECKING:
    from planner.models.running.planning import Planning

ATTRIBUTE = "_planner_session"
_keys = count()


@dataclass(eq=False)
class Setting:
    """Plans set for an execution context: one for all samples, or one per sample of a batch.

    Of a budget, `asked`, they are those for the workload that the model was compiled for: prompts
    are planned for one by one. There are none while it waits for options that only a model's first
    call knows.
    """

    plans: tuple[Plan, ...]
    asked: Any = None
    is_block: bool = False  # whether a ``with`` block ends it
    task: object = None  # where the block was entered
    is_over: bool = False  # whether the block was left

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal keys run equally."""
        return tuple(plan.key for plan in self.plans)

    @property
    def plan(self) -> Plan | tuple[Plan, ...] | None:
        """The one plan, or all of them; None while there is none yet."""
        return self.plans[0] if len(self.plans) == 1 else self.plans or None

    @property
    def holds(self) -> bool:
        """Whether it counts here.

        A block may be left in another task than it was entered in: generators are closed by
        whoever comes by. It is over in the first then; tasks begun inside it go on as they are.
        """
        return not self.is_over or self.task != _task()


# Session key -> what was set for it, the innermost last. Nothing here refers to a model.
_settings: ContextVar[Mapping[int, tuple[Setting, ...]]] = ContextVar(
    "planner_settings", default=MappingProxyType({})
)
# Session key -> what holds there, and the plans that the last prompt was run under.
_ran: ContextVar[Mapping[int, tuple[Setting | None, tuple[Plan, ...]]]] = ContextVar(
    "planner_ran", default=MappingProxyType({})
)

# Whether a copy is made that no plan holds for: what would hold may be what it is made to measure.
_copies_stock: ContextVar[bool] = ContextVar("planner_copies_stock", default=False)


def _never() -> bool:
    return False


def _task() -> object:
    """Which thread and task this is."""
    task = asyncio.current_task() if asyncio._get_running_loop() is not None else None
    return threading.get_ident(), None if task is None else id(task)


def _without(settings: Sequence[Setting], block: Setting) -> tuple[Setting, ...]:
    """Settings without a block, and without what was set inside it alone."""
    left: list[Setting] = []
    inside = False
    for setting in settings:
        inside = setting is block or (inside and not setting.is_block)
        if not inside:
            left.append(setting)
    return tuple(left)


def check_recovered(plans: Sequence[Plan]) -> None:
    """Raise InputError for plans that count on weights which a model without recovery has not."""
    if any(plan.provenance.get("recover") for plan in plans):
        raise InputError(
            "this plan counts on recovered weights: give recover='refit' (--recover refit), or "
            "other utilities"
        )


class Session:
    """What planner knows of one stock transformers model, and what it does with it."""

    # Programs of this many sets of plans are kept.
    PROGRAMS = 64

    def __init__(self, model: nn.Module, graph: Graph | None = None) -> None:
        self.model = model
        self.planning: Planning | None = None  # how plans are made; None until somebody says
        self.default: Setting | None = None  # for contexts that set nothing; None: the base model
        # What makes the model obey: `Skipping` as it is called, `PlanTensors` as the backend
        # compiled it; None while nothing does.
        self.implementation: Any = None
        # Parameters as they were before a recovery changed them for a plan.
        self.before: Mapping[str, Tensor] = {}
        self._graph = graph
        self._begin()
        model.__dict__[ATTRIBUTE] = self

    def _begin(self) -> None:
        """What no copy takes over."""
        self.key = next(_keys)
        self._programs: OrderedDict[tuple[object, ...], Program] = OrderedDict()
        self._layers: tuple[BoundLayer, ...] = ()
        self._ways: list[tuple[Mapping[str, Any], str, object]] = []
        # Why no plan can be obeyed, "" where one can.
        self.obstacle = ""
        self.obstacle_is_over: Callable[[], bool] = _never
        self._adapters: list[tuple[nn.ModuleDict, int]] = []

    @staticmethod
    def of(model: nn.Module) -> Session | None:
        """The session of a model, or of the model inside what wraps it; None without one."""
        known = language_model(model)
        session: Session | None = None if known is None else known.__dict__.get(ATTRIBUTE)
        if session is None:
            return None
        session._forget()
        if session.implementation is None:
            # A shallow copy may still have that of a model that was restored.
            return session if session.model is known else None
        return session

    def _forget(self) -> None:
        """Let go of what is over, since the compiler that it was made for was reset."""
        if self.obstacle_is_over():
            self.obstacle, self.obstacle_is_over = "", _never
        if self.implementation is not None and self.implementation.is_over:
            self.begin_anew(None)
            self.implementation = self.planning = None

    def check_copy(self, model: nn.Module | None) -> None:
        """Raise InputError for a shallow copy of a model that torch.compile's backend has."""
        made = self.implementation is not None and not self.implementation.goes_with_copies
        if made and self.model is not model:
            raise InputError(
                "this is a shallow copy of a compiled model, which shares its weights and plans: "
                "use copy.deepcopy"
            )

    @property
    def graph(self) -> Graph:
        """The model's Graph; lowered when it is first asked for, where nobody gave it."""
        if self._graph is None:
            self._graph = lower_model(self.model, name_of(self.model))
        return self._graph

    @property
    def layers(self) -> tuple[BoundLayer, ...]:
        """The model's decoder layers, found again where modules were exchanged meanwhile."""
        if (
            not self._layers
            or any(known.get(name) is not module for known, name, module in self._ways)
            or any(len(adapters) != count for adapters, count in self._adapters)
        ):
            self._layers = bind(self.model, self.graph)
            self._ways = _ways(self.model, self._layers)
            found = {id(m): m for _, _, m in self._ways if isinstance(m, nn.ModuleDict)}
            self._adapters = [(adapters, len(adapters)) for adapters in found.values()]
            self._programs.clear()
        return self._layers

    @property
    def has_obstacles(self) -> bool:
        """Whether weights of some heads or MLPs are packed, elsewhere, or adapted in other ways."""
        sites = [site for layer in self.layers for site in (layer.heads, layer.mlp)]
        return any(site is not None and site.obstacle for site in sites)

    @property
    def setting(self) -> Setting | None:
        """What holds in this context; None is the base model."""
        mine = reversed(_settings.get().get(self.key, ()))
        found = next((setting for setting in mine if setting.holds), self.default)
        if found is not None and not found.plans and self.planning is not None:
            made = self.asking(found.asked)
            found.plans, found.asked = made.plans, made.asked
        return found

    @property
    def program(self) -> Program | None:
        """What this context runs; None is the base model."""
        setting = self.setting
        return None if setting is None or not setting.plans else self.program_of(setting)

    def asking(self, value: Any) -> Setting:
        """What a budget means, a Plan or several Plans, checked; as for `under`."""
        assert self.planning is not None
        if self.before and value != getattr(self.default, "plan", None):
            raise InputError(
                "this model has weights recovered for one plan: call planner.compile(model, "
                "budget, recover=...) for another"
            )
        given = isinstance(value, Plan)
        if isinstance(value, list | tuple):
            given = any(isinstance(plan, Plan) for plan in value)
        asked = None if given else Budget.of(value)
        accepted = self._accepted(value if given else self.planning.plan(asked))
        if not self.before:
            check_recovered(accepted)
        if asked is not None:
            self.implementation.prepare(self.planning.graph)
        return Setting(accepted, asked)

    # -- prompts ---------------------------------------------------------------------------------

    @property
    def plans(self) -> tuple[Plan, ...]:
        """What this context runs: of a budget the plan of the last prompt that was read here."""
        setting, ran = self.setting, _ran.get().get(self.key)
        if setting is None:
            return ()
        return ran[1] if ran is not None and ran[0] is setting else setting.plans

    def plans_on(self, prompt: Workload) -> tuple[Plan, ...]:
        """What this context runs on a prompt.

        Raises InputError: the budget cannot be met on it.
        """
        setting = self.setting
        if setting is None:
            return (Plan.of(self.graph),)
        if setting.asked is None or self.planning is None:
            return setting.plans
        return (self.planning.plan_on(setting.asked, prompt),)

    def note(self, plans: tuple[Plan, ...]) -> None:
        """Note what a prompt is run under in this context."""
        _ran.set(MappingProxyType({**_ran.get(), self.key: (self.setting, plans)}))

    def program_of(self, setting: Setting) -> Program:
        """Who does what in each layer under some plans."""
        layers = self.layers
        program = self._programs.get(setting.key)
        if program is None:
            program = Program.build(setting.plans, self.graph, layers)
            self._programs[setting.key] = program
            if len(self._programs) > self.PROGRAMS:
                self._programs.popitem(last=False)
        return program

    def under(self, plans: Plan | Sequence[Plan]) -> Override:
        """Have plans hold in this context, from now on or for a ``with`` block.

        They are one for all samples, or one per sample of the batches to come. Raises InputError
        where one does not fit the model; nothing has changed then.
        """
        return Override(self, Setting(self._accepted(plans)))

    def obey(self, plans: Plan | Sequence[Plan], asked: Budget | None = None) -> None:
        """Have plans, or the budget that they are for, hold in all contexts; as for `under`.

        What was set before is void.
        """
        self.begin_anew(Setting(self._accepted(plans), asked))

    def _accepted(self, plans: Plan | Sequence[Plan]) -> tuple[Plan, ...]:
        accepted = (plans,) if isinstance(plans, Plan) else tuple(plans)
        if not accepted:
            raise InputError("an empty list of plans; give one plan, or one per sample")
        if not all(isinstance(plan, Plan) for plan in accepted):
            raise InputError("a list of plans holds something else: give one Plan per sample")
        if self.implementation is None:
            raise InputError("planner.restore has let go of this model; call planner.compile again")
        self.implementation.accept(accepted)
        return accepted

    def set(self, setting: Setting) -> None:
        """Let something hold in this context until it is changed, or its block is left."""
        mine = [other for other in _settings.get().get(self.key, ()) if other is not setting]
        # Of what was set without a block, the last is enough: for a block to put back.
        while len(mine) > 1 and not mine[-1].is_block and not mine[-2].is_block:
            del mine[-2]
        self._write((*mine, setting))

    def leave(self, block: Setting) -> None:
        """Put back what held before a block."""
        block.is_over = True
        mine = _settings.get().get(self.key, ())
        if block in mine:
            self._write(_without(mine, block))

    def _write(self, mine: tuple[Setting, ...]) -> None:
        _settings.set(MappingProxyType({**_settings.get(), self.key: mine}))
        if self.implementation is not None:
            self.implementation.changed()

    def begin_anew(self, default: Setting | None) -> None:
        """Give all contexts a new default; what was set before is void in all of them."""
        self.key, self.default = next(_keys), default
        if self.implementation is not None:
            self.implementation.changed()

    def close(self) -> None:
        """Give the model back as it was."""
        self.begin_anew(None)
        with torch.no_grad():
            for name, value in self.before.items():
                self.model.get_parameter(name).copy_(value)
        self.before = {}
        if self.implementation is not None:
            self.implementation.close()
            self.implementation = None
        if self.model.__dict__.get(ATTRIBUTE) is self:
            del self.model.__dict__[ATTRIBUTE]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the model, or a file of it, takes over: among it the plans that hold."""
        self._forget()
        setting = None if _copies_stock.get() else self.setting
        goes = self.implementation is None or self.implementation.goes_with_copies
        default = None if setting is None else Setting(setting.plans, setting.asked)
        if not goes and setting is not None:
            # It waits for a call that compiles the copy.
            default = Setting((), setting.plan if setting.asked is None else setting.asked)
        return {
            "model": self.model,
            "planning": self.planning if goes else None,
            "default": default,
            "implementation": self.implementation if goes else None,
            "before": self.before,
            "_graph": self._graph,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def stock_copy(session: Session) -> nn.Module:
    """The model of a session as it was before any plan, on the same weights, to evaluate.

    What runs it is no business of the model's own passes, in other threads or compiled.
    """
    model, before = session.model, session.before
    same: dict[int, Any] = {
        id(tensor): tensor for tensor in chain(model.parameters(), model.buffers(), before.values())
    }
    for name, value in before.items():
        parameter = model.get_parameter(name)
        same[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    stock = _copies_stock.set(True)
    try:
        found = copy.deepcopy(model, same)
    finally:
        _copies_stock.reset(stock)
    known = Session.of(found)
    if known is not None:
        known.before = {}
        known.close()
    return found.eval()


class Override:
    """What `planner.budget` returns: it holds already, and a ``with`` block ends it."""

    def __init__(self, session: Session, setting: Setting) -> None:
        self._session, self._setting = session, setting
        session.set(setting)

    @property
    def plan(self) -> Plan | tuple[Plan, ...] | None:
        """That holds, or one per sample; None before the first call of a compiled model."""
        return self._setting.plan

    def __enter__(self) -> Any:
        """Have the block end it; returns the plan."""
        setting = self._setting
        setting.is_block, setting.task, setting.is_over = True, _task(), False
        self._session.set(setting)
        return self.plan

    def __exit__(self, *_: object) -> None:
        self._session.leave(self._setting)


def language_model(module: nn.Module) -> nn.Module | None:
    """The outermost transformers model in a module that has a decoder, None without one.

    The module may wrap it: a PeftModel, what ``torch.compile`` made of it, DDP, any that holds it.
    """
    return next(language_models(module), None)


def language_models(module: nn.Module) -> Iterator[nn.Module]:
    """All of them, the outermost first."""
    for inner in getattr(module, "_orig_mod", module).modules():
        if isinstance(inner, PreTrainedModel) and callable(getattr(inner, "get_decoder", None)):
            yield inner


def name_of(model: nn.Module) -> str:
    """What a loaded model is called: the last part of where it was loaded from."""
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "model")
    return name.rstrip("/").rpartition("/")[2] or "model"


def _ways(
    model: nn.Module, layers: Sequence[BoundLayer]
) -> list[tuple[Mapping[str, Any], str, object]]:
    """Every module on the ways to what is bound: (modules it is among, its name there, itself)."""
    found: dict[str, tuple[Mapping[str, Any], str, object]] = {}
    for path in (path for layer in layers for path in layer.paths):
        module, way = model, ""
        for name in path.split("."):
            way = f"{way}.{name}"
            known = module._modules
            inner = known[name]
            assert inner is not None
            found[way] = (known, name, inner)
            module = inner
    return list(found.values())
