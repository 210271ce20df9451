"""Skipping: a stock model runs what its plans keep, and nothing else.

The unit is a forward pass. When the model is called, or a part of it that its decoder is in,
``forward`` of the modules that this context's plans narrow is shadowed on the instance; when the
pass is over, all of it is undone. So the stock code runs unchanged, and whoever looks at the model
between two passes finds it as it was, a few hooks aside.

What torch.compile traces reads shadows whenever it is called, so behind a first trace they stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from planner.ir.cost import Workload
from planner.ir.cost.workload import DEFAULT_NEW_TOKENS
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.lowering.decoder import decoder_of
from planner.kernels.choice import Kernels
from planner.models.running.attention_blocks import named
from planner.models.running.forward_pass import Call
from planner.models.running.kernel_products import products_of
from planner.models.running.kv_cache import cache_among
from planner.models.running.layers import Setup
from planner.models.running.pass_lock import PassLock
from planner.models.running.products import Products
from planner.models.running.program import Program
from planner.models.running.prompts import Prompts
from planner.models.running.ready import Preparing, Ready
from planner.models.running.refusals import BATCHING, Batching, check_gradients_come
from planner.models.running.session import Session, Setting, language_model
from planner.models.running.traced import asked, ticket
from planner.models.tokens.vision_stage import VisionStage
from planner.plan import Plan

# Arguments of a module's forward: by place and by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# A module with its arguments.
Called = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
# Attribute of a KV cache: the plans that it was filled under, where a budget has chosen them.
PLANS = "_planner_plans"


class Decider(Protocol):
    """Decides prompt by prompt what a model runs, in the place of the context's plans."""

    # What a pass over a new prompt begins with; None is the base model.
    prompts: Ready | None

    def ready_for(self, kwargs: dict[str, Any]) -> Ready | None:
        """What a pass begins with, before the model runs."""
        ...

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The decoder begins: its arguments."""
        ...

    def leave(self, output: Any) -> Any:
        """The decoder has ended: its output; None where it failed."""
        ...


class Skipping:
    """Makes the model of a session skip what is off.

    Attributes:
        decider: decides prompt by prompt; None where the context's plans hold.
    """

    def __init__(self, session: Session, products: Products) -> None:
        self.session = session
        self.preparing = Preparing(session, products, self)
        self.decider: Decider | None = None
        self._begin_anew()
        model = session.model
        self._decoder: nn.Module = decoder_of(model)
        # A pass begins with the first of them that is called.
        self._entries = _way(session.model, self._decoder)
        self._handles = [
            handle
            for module in self._entries
            for handle in (
                module.register_forward_pre_hook(self.begin, with_kwargs=True),
                module.register_forward_hook(self.end, always_call=True),
            )
        ]
        self.prompts = Prompts(self._entries)
        # A graph that was compiled before does not look for hooks, but at `forward` it does.
        model.__dict__.setdefault("forward", model.forward)
        if hasattr(model, BATCHING):
            model.__dict__.setdefault(BATCHING, Batching(session))

    def _begin_anew(self) -> None:
        self._lock = PassLock()
        # The module whose call is the pass that is made.
        self._running: nn.Module | None = None
        self._standing: Ready | None = None
        # What stands between passes, since torch.compile has traced the model.
        self._is_traced = False
        self._held: Ready | None = None
        # Of a pass under a budget: its call, and then the plans that the decoder runs.
        self._call: Called | None = None
        self._planned: tuple[Plan, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew, of the modules of a copy."""
        kept = ("session", "preparing", "prompts", "_decoder", "_entries", "_handles")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, decider=None)
        self._begin_anew()

    @property
    def goes_with_copies(self) -> bool:
        """Whether a copy of the model obeys as well."""
        return True

    @property
    def is_over(self) -> bool:
        """Not until `close`."""
        return False

    def accept(self, plans: tuple[Plan, ...]) -> Program:
        """Make ready for plans; raise InputError where they cannot be carried out."""
        program = self.session.program_of(Setting(plans))
        self.preparing.ready(program)
        return program

    def prepare(self, graph: Graph) -> None:
        """For prompts that decide what is narrowed: learn ahead what that takes."""
        self.preparing.prepare(graph)
        self._watch_encoders(graph)

    def changed(self) -> None:
        """Other plans are active in this context: what torch.compile has traced runs them next."""
        if self._is_traced:
            with self.alone():
                self._held = self._ready()
                if self._held is not None:
                    # What is traced is to stay: the second time, frozen weights are copied.
                    self._held.refresh()

    def use(self, products: Products) -> None:
        """Compute with other products from now on."""
        self.preparing.use(products)
        self.changed()

    def close(self) -> None:
        """Give the model back as it was."""
        if self.is_running:
            raise InputError("the model is running: restore it when its pass is over")
        self._is_traced, self._held = False, None
        with self.alone():
            for handle in self._handles:
                handle.remove()
            self.prompts.encoders.close()
            if isinstance(self.session.model.__dict__.get(BATCHING), Batching):
                del self.session.model.__dict__[BATCHING]
            self.preparing.close()
        own: Any = self.session.model.__dict__.get("forward")
        if getattr(own, "__func__", None) is type(self.session.model).forward:
            del self.session.model.__dict__["forward"]

    @property
    def kept_image_tokens(self) -> dict[int, list[int]]:
        """See `Ready`, for the plans of this context."""
        ready = self.preparing.ready(self.session.program_of(Setting(self.session.plans)))
        return {} if ready is None else ready.kept_image_tokens

    @property
    def compile_options(self) -> dict[str, Any]:
        """As `planner.compile` takes them."""
        products = self.preparing.products
        return {"freeze": products.frozen_bytes > 0, "kernels": str(products.kernels)}

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments | None:
        """Before the model runs, or a part of it that its decoder is in."""
        if torch.compiler.is_dynamo_compiling():
            shown = self._hold()
            if self._held is not None and module is self.session.model:
                self._held.begin(module, args, kwargs)
            return asked(args, kwargs, shown) if module is self._decoder else None
        if all(module is not entry for entry in self._entries):
            if getattr(module, "_is_replica", False):
                raise InputError(
                    "DataParallel copies the model for every pass, and a plan is of one model; use "
                    "DistributedDataParallel"
                )
            # A shallow copy has the same parts, where the pass will begin.
            return None
        if not self._lock.is_mine:
            self._open(module, args, kwargs)
        if module is not self._decoder or self._running is None:
            return None
        if self.decider is not None:
            return self.decider.enter(args, kwargs)
        if self._call is not None:
            self._plan(args, kwargs)
        return None

    def _open(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Of `Module._call_impl`, which has called `begin` by a function inside it.
        self._lock.acquire(sys._getframe(3))
        try:
            # A pass that was cut short may have left something.
            self._running = self._call = None
            self._place(None)
            setting = self.session.setting
            if self.decider is None and setting is not None and setting.asked is not None:
                self._call = module, args, kwargs
            else:
                self._run(
                    self._ready() if self.decider is None else self.decider.ready_for(kwargs),
                    (module, args, kwargs),
                )
            self._running = module
        except BaseException:
            self._close()
            raise

    def _run(self, ready: Ready | None, call: Called) -> None:
        """Have a pass run what is ready, from here on."""
        if ready is not None:
            check_gradients_come(ready.program)
        self._place(ready)
        if ready is not None:
            ready.begin(*call)

    def _plan(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Plan for the prompt that the decoder is given, or go on as its cache was filled."""
        session, setting = self.session, self.session.setting
        assert self._call is not None
        assert setting is not None
        given = named(self._decoder, args, kwargs)
        cache = cache_among(given)
        plans: tuple[Plan, ...] = getattr(cache, PLANS, setting.plans)
        if cache is None or not cache.get_seq_length():
            plans = session.plans_on(self._read(self._call, given))
            session.note(plans)
        elif plans[0].budget != setting.plans[0].budget:
            plans = setting.plans
        ready = self.preparing.ready(session.program_of(Setting(plans)))
        self._run(ready, self._call)
        self._planned = plans

    def end(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Behind it, whether it failed or not."""
        if torch.compiler.is_dynamo_compiling():
            return output
        if self._running is None or not self._lock.is_mine:
            return output
        if module is self._decoder:
            if self.decider is not None:
                output = self.decider.leave(output)
            elif self._call is not None and isinstance(output, Mapping):
                cache: Any = cache_among(output)
                if cache is not None:
                    setattr(cache, PLANS, self._planned)
        if self._running is module:
            self._close()
        return output

    def _close(self) -> None:
        self._running = self._call = None
        # What encoders did is of no prompt to come.
        self.prompts.encoders.take_spent()
        try:
            if self._standing is not None:
                self._standing.end()
            if self._standing is not self._held:
                self._place(self._held)
        finally:
            self._lock.release()

    def _ready(self) -> Ready | None:
        """What stands where under this context's plans."""
        return self.preparing.ready(self.session.program)

    def _place(self, ready: Ready | None) -> None:
        if self._standing is not None:
            self._standing.take_away()
        self._standing = ready
        if ready is not None:
            ready.put_in_place()

    @property
    def _new_tokens(self) -> int:
        """Tokens that a prompt is planned to be followed by."""
        planning = self.session.planning
        return DEFAULT_NEW_TOKENS if planning is None else planning.request.new_tokens

    def _watch_encoders(self, graph: Graph) -> None:
        """Count what they do, apart from what the Graph has of the decoder."""
        known = {operator.module for operator in graph if operator.part == "decoder"}
        stack = self.session.layers[0].path.rpartition(".")[0]
        self.prompts.encoders.watch(known | {stack})

    def _read(self, call: Called, given: Mapping[str, Any]) -> Workload:
        """The prompt that the decoder is given, see `Prompts.read`."""
        return self.prompts.read(call, given, self._new_tokens, self.session.layers[0].module)

    def prompt_of(self, inputs: Mapping[str, Any]) -> Workload:
        """The prompt that the decoder would be given; what comes before it runs."""
        model, decoder = self.session.model, self._decoder

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = named(decoder, args, kwargs)
            raise _Read(self._read((model, (), dict(inputs)), given))

        with self.alone(), torch.no_grad():
            self._watch_encoders(self.session.graph)
            handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
            try:
                model(**inputs)
            except _Read as read:
                return read.prompt
            finally:
                handle.remove()
        raise InputError("the model has not called its decoder: there is no prompt")

    def again(
        self, ready: Ready, setup: Setup, call: Call | None, run: Callable[..., Any], *args: Any
    ) -> Any:
        """Run a layer; in a backward pass that kept no activations, under the plan of its pass."""
        if self._lock.is_mine:
            return run(*args)
        with self.alone():
            self._place(ready)
            ready.passes.current = call
            setup.activate()
            return run(*args)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _hold(self) -> str:
        """Have this context's plans stand for torch.compile, which is tracing; see `ticket`."""
        if not self._is_traced:
            self._is_traced = True
            self.changed()
        return ticket(self.wanted)

    def wanted(self) -> object:
        """What this context's plans run; None is the base model."""
        program = self.session.program
        return None if program is None or program.is_dense else program.key

    @property
    def is_running(self) -> bool:
        """Whether the thread that asks is in a pass."""
        return self._running is not None and self._lock.is_mine

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nothing stands, no pass is made by others, and hooks do nothing."""
        if self._lock.is_mine:
            yield
            return
        self._lock.acquire()
        try:
            self._place(None)
            yield
        finally:
            self._place(self._held)
            self._lock.release()

    def redirect(self, plans: tuple[Plan, ...]) -> Ready:
        """Go on under other plans in the middle of a prompt's forward pass.

        Call between two layers, in a pass that runs what `Preparing.ready_always` gave. The layers
        that have run must do the same under the old plans and the new, and the token stages must be
        among them. Returns what to run when the same cache is met again.
        """
        standing = self._standing
        if standing is None or standing.passes.current is None:
            raise InputError("plans can be changed in mid-pass only while a prompt is being read")
        program = self.session.program_of(Setting(plans))
        ready = self.preparing.redirected(program, standing.stages)
        ready.passes.take_over(standing.passes)
        self._place(ready)
        return ready

    def is_active(self, vision: VisionStage) -> bool:
        """Whether a stage in front of the projector is to work in this context."""
        decider = self.decider
        ready = decider.prompts if decider is not None else self._ready()
        return ready is not None and ready.stages is not None and ready.stages.vision is vision


class _Read(Exception):
    """Ends a pass whose prompt is known."""

    def __init__(self, prompt: Workload) -> None:
        self.prompt = prompt


def _way(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The model, its decoder, and what lies between them.

    Some wrappers call the model's ``forward``, which runs no hooks; what is inside runs its own.
    """
    path = next(path for path, module in model.named_modules() if module is decoder)
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]


def session_on(
    model: nn.Module,
    graph: Graph | None = None,
    *,
    freeze: bool | None = None,
    kernels: Kernels | None = None,
) -> Session:
    """The session of a model that is called as it is; made where there is none.

    Args:
        model: a stock transformers model, or what wraps it.
        graph: its Graph, where it is known.
        freeze: promise that weights stay as they are, see `planner.models.running.products`.
        kernels: who computes, at first PyTorch. None leaves this and `freeze` as said before.

    Raises InputError: there is no language model, or torch.compile's backend ``planner`` has it.
    """
    known = language_model(model)
    if known is None:
        raise InputError(f"this {type(model).__name__} holds no language model of transformers")
    session = Session.of(known) or Session(known, graph)
    if session.implementation is None:
        session.implementation = Skipping(session, Products())
    if not isinstance(session.implementation, Skipping):
        raise InputError(
            "torch.compile(..., backend='planner') has this model already: planner.budget sets its "
            "budget, and planner.restore lets go of it"
        )
    if freeze is not None or kernels is not None:
        before = session.implementation.preparing.products
        bytes_ = before.frozen_bytes
        if freeze is not None:
            bytes_ = sum(parameter.nbytes for parameter in known.parameters()) if freeze else 0
        chosen = before.kernels if kernels is None else kernels
        session.implementation.use(products_of(session.graph, chosen, bytes_))
    return session


@contextmanager
def session_for(model: nn.Module, graph: Graph, *, freeze: bool | None = None) -> Iterator[Session]:
    """As `session_on`, for a block; a model without a session is given back as it was."""
    known = Session.of(model)
    is_new = known is None or known.implementation is None
    session = session_on(model, graph, freeze=freeze)
    try:
        yield session
    finally:
        if is_new:
            session.close()


@contextmanager
def obeying(
    model: nn.Module, graph: Graph, plans: Plan | Sequence[Plan], *, freeze: bool | None = None
) -> Iterator[Session]:
    """Have a model obey plans for a block; see `session_for` and `Session.under`."""
    with session_for(model, graph, freeze=freeze) as session, session.under(plans):
        yield session
