"""Skipping: a stock model runs what its plans keep, and nothing else.

The unit is a forward pass. When the model is called, or a part of it that its decoder is in, what
this execution context's plans leave out is put out of the way, by shadowing ``forward`` of the
modules concerned on the instance: linears compute with what is kept, layers that are off return
their input, layers behind a token stage run on the tokens that are left. When the pass is over, all
of it is undone. So the stock code runs unchanged, threads and tasks share a model under plans of
their own (one pass at a time, in the order of asking), and whoever looks at the model between two
passes - to copy it, to save it, to exchange its weights or its ``forward`` - finds it as it was, a
few hooks aside.

What torch.compile traces reads shadows whenever it is called, so behind a first trace they stay,
as the context that sets a budget wants them.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.kernels.choice import Kernels
from planner.models.running.attention_blocks import AttentionBlock, probe
from planner.models.running.bindings import BoundLayer, BoundSite
from planner.models.running.forward_pass import Call, Passes
from planner.models.running.kernel_products import products_of
from planner.models.running.layers import AttentionForward, BlockForward, LayerForward, Setup
from planner.models.running.pass_lock import PassLock
from planner.models.running.patches import ConfigView, Patches, Shadow
from planner.models.running.products import Compute, Products, Refreshed, TorchProducts
from planner.models.running.program import LayerGroup, LayerProgram, Program
from planner.models.running.recording import recording
from planner.models.running.session import Session, Setting, language_model
from planner.models.tokens.token_stages import Places, TokenStages
from planner.models.tokens.vision_stage import VisionStage
from planner.plan import Plan
from planner.planning.selectors import VisionSelector

__all__ = ["Decider", "Ready", "Skipping", "obeying", "session_on"]

# Attributes of transformers' layers: whether, and by what function, they keep no activations.
CHECKPOINTS, CHECKPOINT = "gradient_checkpointing", "_gradient_checkpointing_func"

# Arguments of a module's forward: by place and by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Decider(Protocol):
    """Decides prompt by prompt what a model runs, in the place of the context's plans.

    Attributes:
        prompts: what a pass over a new prompt begins with; None is the base model.
    """

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


class Ready:
    """A program made ready for a model: what stands where while it runs.

    Args:
        program: what to run.
        stages: its token stages; None where no token is dropped.
        again: runs a layer again in a backward pass, see `Skipping.again`.
    """

    def __init__(
        self, program: Program, stages: TokenStages | None, again: Callable[..., Any]
    ) -> None:
        self.program = program
        self.stages = stages
        self._again = again
        self.passes = Passes(program, stages)
        self.shadows: list[tuple[nn.Module, Shadow]] = []
        self.attributes: list[tuple[nn.Module, str, Any]] = []
        self.products: list[Refreshed] = []
        self._patches = Patches()

    @property
    def kept_image_tokens(self) -> dict[int, list[int]]:
        """How many image tokens were kept of the last prompt.

        Returns:
            Layer of a token stage -> what was left behind it, one number a row of the batch. Empty
            before the first prompt, and where no token is dropped.
        """
        kept = {} if self.stages is None else self.stages.kept
        return {layer: counts.tolist() for layer, counts in sorted(kept.items())}

    def put_in_place(self) -> None:
        """Shadow what the program touches."""
        self.refresh()
        for module, shadow in self.shadows:
            # Whole weights are multiplied in their own way where others have put a `forward`.
            if shadow.narrows or "forward" not in module.__dict__:
                self._patches.shadow(module, shadow)
            if isinstance(shadow, LayerForward) and getattr(module, CHECKPOINTS, False):
                checkpoint = partial(self._checkpoint, shadow, getattr(module, CHECKPOINT))
                self._patches.set(module, CHECKPOINT, checkpoint)
        for module, name, value in self.attributes:
            self._patches.set(module, name, value)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass begins with the call of a module, and these arguments."""
        if self.stages is not None:
            self.stages.remember(module, args, kwargs)

    def refresh(self) -> None:
        """Look what weights are now."""
        for product in self.products:
            product.refresh()

    def end(self) -> None:
        """Let go of a pass, and of its arguments."""
        self.passes.end()
        if self.stages is not None:
            self.stages.arguments = {}

    def _checkpoint(self, layer: LayerForward, stock: Any, run: Any, *args: Any) -> Any:
        """Stands in for a layer's function for gradient checkpointing."""
        again = partial(self._again, self, layer.setup, self.passes.current, run)
        return stock(again, *args)

    def take_away(self) -> None:
        """Undo it."""
        self._patches.undo()


class Skipping:
    """Makes the model of a session skip what is off.

    Args:
        session: of the model.
        products: what linears compute with.

    Attributes:
        decider: decides prompt by prompt; None where the context's plans hold.
    """

    # Programs of this many sets of plans stay ready.
    READY = 32

    def __init__(self, session: Session, products: Products) -> None:
        self.session = session
        self.products = products
        self.decider: Decider | None = None
        self._visions: dict[VisionSelector, VisionStage] = {}
        self._begin_anew()
        model: Any = session.model
        self._decoder: nn.Module = model.get_decoder()
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
        # A graph that was compiled before does not look for hooks, but at `forward` it does.
        model.__dict__.setdefault("forward", model.forward)

    def _begin_anew(self) -> None:
        self._lock = PassLock()
        self._ready: OrderedDict[tuple[object, ...], Ready] = OrderedDict()
        self._attention: dict[Any, AttentionBlock] = {}
        # The module whose call is the pass that is made.
        self._running: nn.Module | None = None
        self._standing: Ready | None = None
        # What stands between passes, since torch.compile has traced the model.
        self._is_traced = False
        self._held: Ready | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew, of the modules of a copy."""
        kept = ("session", "products", "_visions", "_decoder", "_entries", "_handles")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, decider=None)
        self._begin_anew()

    @property
    def is_over(self) -> bool:
        """Not until `close`."""
        return False

    # -- of the session --------------------------------------------------------------------------

    def accept(self, plans: tuple[Plan, ...]) -> Program:
        """Make ready for plans; raise InputError where they cannot be carried out."""
        program = self.session.program_of(Setting(plans))
        self.ready(program)
        return program

    def changed(self) -> None:
        """Other plans are active in this context: what torch.compile has traced runs them next."""
        if self._is_traced:
            with self._alone():
                self._held = self.ready(self.session.program)
                if self._held is not None:
                    # What is traced is to stay: the second time, frozen weights are copied.
                    self._held.refresh()

    def use(self, products: Products) -> None:
        """Compute with other products from now on."""
        self.products = products
        self._ready.clear()
        self.changed()

    def close(self) -> None:
        """Give the model back as it was."""
        self._is_traced, self._held = False, None
        with self._alone():
            for handle in self._handles:
                handle.remove()
            for vision in self._visions.values():
                vision.close()
        own: Any = self.session.model.__dict__.get("forward")
        if getattr(own, "__func__", None) is type(self.session.model).forward:
            del self.session.model.__dict__["forward"]

    @property
    def kept_image_tokens(self) -> dict[int, list[int]]:
        """See `Ready`, for the plans of this context."""
        ready = self.ready(self.session.program)
        return {} if ready is None else ready.kept_image_tokens

    # -- a pass ----------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments | None:
        """Before the model runs, or a part of it that its decoder is in."""
        if torch.compiler.is_dynamo_compiling():
            self._hold()
            if self._held is not None and module is self.session.model:
                self._held.begin(module, args, kwargs)
            return None
        if all(module is not entry for entry in self._entries):
            raise InputError(
                "DataParallel copies the model for every pass, and a plan is of one model; use "
                "DistributedDataParallel"
            )
        if not self._lock.is_mine:
            self._open(module, args, kwargs)
        if self.decider is not None and module is self._decoder and self._running is not None:
            return self.decider.enter(args, kwargs)
        return None

    def _open(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Called by `begin`, which torch calls: the pass is over when that call is.
        self._lock.acquire(sys._getframe(2))
        try:
            if self.decider is not None:
                ready = self.decider.ready_for(kwargs)
            else:
                ready = self.ready(self.session.program)
            # What a pass that was cut short has left goes here, too.
            self._place(ready)
            self._running = module
            if ready is not None:
                ready.begin(module, args, kwargs)
        except BaseException:
            self._close()
            raise

    def end(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Behind it, whether it failed or not."""
        if torch.compiler.is_dynamo_compiling() or self._running is None:
            return output
        if self.decider is not None and module is self._decoder:
            output = self.decider.leave(output)
        if self._running is module:
            self._close()
        return output

    def _close(self) -> None:
        self._running = None
        try:
            if self._standing is not None:
                self._standing.end()
            if self._standing is not self._held:
                self._place(self._held)
        finally:
            self._lock.release()

    def _place(self, ready: Ready | None) -> None:
        if self._standing is not None:
            self._standing.take_away()
        self._standing = ready
        if ready is not None:
            ready.put_in_place()

    def again(
        self, ready: Ready, setup: Setup, call: Call | None, run: Callable[..., Any], *args: Any
    ) -> Any:
        """Run a layer; in a backward pass that kept no activations, under the plan of its pass."""
        if self._lock.is_mine:
            return run(*args)
        with self._alone():
            self._place(ready)
            ready.passes.current = call
            setup.activate()
            return run(*args)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _hold(self) -> bool:
        """Have this context's plans stand for torch.compile, which is tracing."""
        if not self._is_traced:
            self._is_traced = True
            self.changed()
        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
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

        Call between two layers, in a pass that runs what `ready` gave for ``always``. The layers
        that have run must do the same under the old plans and the new, and the token stages must be
        among them.

        Returns:
            What to run when the same cache is met again.

        Raises:
            InputError: a plan does not fit the model, or no prompt is being read.
        """
        standing = self._standing
        if standing is None or standing.passes.current is None:
            raise InputError("plans can be changed in mid-pass only while a prompt is being read")
        program = self.session.program_of(Setting(plans))
        ready = self._made_ready(program, standing.stages)
        ready.passes.take_over(standing.passes)
        self._place(ready)
        return ready

    # -- made ready ------------------------------------------------------------------------------

    def ready(self, program: Program | None) -> Ready | None:
        """What stands where under a program; None where nothing is left out."""
        if program is None or program.is_dense:
            return None
        known = self._ready.get(program.key)
        if known is None or known.program is not program:
            known = self._ready[program.key] = self.ready_always(program)
            if len(self._ready) > self.READY:
                self._ready.popitem(last=False)
        return known

    def ready_always(self, program: Program, places: Places | None = None) -> Ready:
        """As `ready`, for a program that `redirect` may change, even a dense one.

        Args:
            program: what to run.
            places: see `TokenStages`.
        """
        stages = None
        if program.has_tokens:
            stages = TokenStages(
                self.session.model, program, self._vision, places, self.products.kernels
            )
        return self._made_ready(program, stages)

    def prepare(self) -> None:
        """Learn ahead all that narrowing heads takes, which runs blocks of the model.

        `redirect` cannot do that in the middle of a forward pass.
        """
        for layer in self.session.layers:
            if layer.heads is not None and not layer.heads.obstacle:
                self._probed(layer.heads)
            if layer.mlp is not None and not layer.mlp.obstacle:
                self.products.mlp(layer.mlp, None)

    def _vision(self, selector: VisionSelector) -> VisionStage:
        """The stage of a selector in front of the projector, which works where it is active."""
        if selector not in self._visions:
            model, graph = self.session.model, self.session.graph
            self._visions[selector] = VisionStage(model, graph, selector, self._is_active)
        return self._visions[selector]

    def _is_active(self, vision: VisionStage) -> bool:
        decider = self.decider
        ready = decider.prompts if decider is not None else self.ready(self.session.program)
        return ready is not None and ready.stages is not None and ready.stages.vision is vision

    def _made_ready(self, program: Program, stages: TokenStages | None) -> Ready:
        ready = Ready(program, stages, self.again)
        for layer in program.layers:
            setups = self._setups(layer, ready)
            ready.shadows.append((layer.layer.module, LayerForward(ready.passes, layer, setups)))
        if not program.is_dense:
            touched = {layer.layer.index for layer in program.layers}
            for bound in self.session.layers:
                if bound.index not in touched:
                    self._multiply(bound, ready)
        return ready

    def _multiply(self, layer: BoundLayer, ready: Ready) -> None:
        """Have a layer that stays as it is multiply as the others do."""
        for site in (layer.heads, layer.mlp):
            for linear in () if site is None else site.linears:
                product = self.products.linear(linear, None)
                if product is not None:
                    forward = BlockForward(narrows=False)
                    forward.active = product
                    ready.shadows.append((linear.module, forward))

    def _setups(self, layer: LayerProgram, ready: Ready) -> tuple[Setup, ...]:
        """How the layer runs for each of its groups; what that takes is noted to be shadowed."""
        heads = layer.layer.heads
        computed = [
            self._forwards(site, [getattr(group, kind) for group in layer.groups], ready)
            for kind, site in (("heads", heads), ("mlp", layer.layer.mlp))
        ]
        block = attention = None
        if heads is not None and any(group.heads is not None for group in layer.groups):
            block = self._probed(heads)
            if any(group.heads == () for group in layer.groups):
                attention = AttentionForward(heads, block)
                ready.shadows.append((heads.module, attention))
        setups = []
        for number, group in enumerate(layer.groups):
            products = tuple((f, active[number]) for f, active in (*computed[0], *computed[1]))
            attributes = self._attributes(layer, group, block, ready.passes)
            setups.append(Setup(group, products, heads, attributes, attention))
        if heads is not None:
            first = setups[0].attributes
            ready.attributes += [(heads.module, name, value) for name, value in first.items()]
        setups[0].compute()
        return tuple(setups)

    def _forwards(
        self, site: BoundSite | None, kept: list[Any], ready: Ready
    ) -> list[tuple[BlockForward, list[Compute | None]]]:
        """What stands in for modules of a site, and computes what by group.

        `kept`: lanes by group; None for all of them.
        """
        if site is None or site.obstacle:
            return []
        asked: list[tuple[nn.Module, list[Compute | None]]] = []
        if site.site.kind == "mlp":
            with self._alone():
                whole = [self.products.mlp(site, lanes) for lanes in kept]
            if any(product is not None for product in whole):
                asked.append((site.module, whole))
        if not asked:
            for linear in site.linears:
                active = [self.products.linear(linear, lanes) for lanes in kept]
                asked.append((linear.module, active))
        forwards = []
        for module, active in asked:
            if any(product is not None for product in active):
                forward = BlockForward(narrows=any(lanes is not None for lanes in kept))
                ready.shadows.append((module, forward))
                ready.products += [p for p in active if isinstance(p, Refreshed)]
                forwards.append((forward, active))
        return forwards

    def _probed(self, site: BoundSite) -> AttentionBlock:
        # Blocks of one class and one layout behave alike.
        layout = tuple((linear.features, linear.binding.blocks) for linear in site.linears)
        key = (type(site.module), site.site.lanes, layout)
        if key not in self._attention:
            width = int(self.session.graph.properties["hidden_size"])
            with self._alone():
                self._attention[key] = probe(self._decoder, site, width)
        return self._attention[key]

    def _attributes(
        self, program: LayerProgram, group: LayerGroup, block: AttentionBlock | None, passes: Passes
    ) -> dict[str, Any]:
        """What an attention block's own attributes must be: head counts, and its config."""
        site = program.layer.heads
        if site is None:
            return {}
        attributes: dict[str, Any] = {}
        replaced: dict[str, Any] = {}
        if block is not None:
            kept = block.lanes if group.heads is None else sum(b - a for a, b in group.heads)
            attributes |= block.changes(kept, "module")
            replaced |= block.changes(kept, "config")
        function = self.products.attention(site)
        config = getattr(site.module, "config", None)
        recorded = passes.stages.recorded if passes.stages is not None else ()
        evicts = any(other.kv is not None for other in program.groups)
        if (evicts or program.layer.index in recorded) and config is not None:
            record = partial(passes.record, program.layer.index)
            attributes["config"] = recording(config, record, function, **replaced)
        elif function is not None:
            attributes["config"] = ConfigView(config, _attn_implementation=function, **replaced)
        elif replaced:
            attributes["config"] = ConfigView(config, **replaced)
        return attributes


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
        freeze: promise that weights stay as they are, see `planner.models.running.products`; None
            leaves it at what was said before.
        kernels: who computes, see `planner.kernels.choice`; None leaves it at what was said before,
            PyTorch at first.

    Raises:
        InputError: there is no language model, or torch.compile's backend ``planner`` has it.
    """
    known = language_model(model)
    if known is None:
        raise InputError(f"this {type(model).__name__} holds no language model of transformers")
    session = Session.of(known) or Session(known, graph)
    if session.implementation is None:
        session.implementation = Skipping(session, TorchProducts())
    if not isinstance(session.implementation, Skipping):
        raise InputError(
            "torch.compile(..., backend='planner') has this model already: planner.budget sets its "
            "budget, and planner.restore lets go of it"
        )
    if freeze is not None or kernels is not None:
        before = session.implementation.products
        bytes_ = before.frozen_bytes
        if freeze is not None:
            bytes_ = sum(parameter.nbytes for parameter in known.parameters()) if freeze else 0
        chosen = before.kernels if kernels is None else kernels
        session.implementation.use(products_of(session.graph, chosen, bytes_))
    return session


@contextmanager
def obeying(
    model: nn.Module, graph: Graph, plans: Plan | Sequence[Plan], *, freeze: bool | None = None
) -> Iterator[Session]:
    """Have a model obey plans for a block; one without a session is given back as it was.

    Args:
        model: a stock transformers model.
        graph: its Graph.
        plans: one for all samples, or one per sample of the batches to come.
        freeze: as for `session_on`.

    Raises:
        InputError: a plan does not fit the model.
    """
    known = Session.of(model)
    is_new = known is None or known.implementation is None
    session = session_on(model, graph, freeze=freeze)
    try:
        with session.under(plans):
            yield session
    finally:
        if is_new:
            session.close()
