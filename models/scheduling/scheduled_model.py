"""A model running under a scheduler: every prompt gets its own plan while it is being read.

    with Scheduled(model, graph, scheduler).using(0.65):
        model.generate(**inputs)

Behind the back of the stock code a latency token is appended to the prompt. When the layers that
always run are through, the scheduler turns that token's hidden states into one plan per sample, and
the rest of the decoder obeys. The token stays in the KV cache, and so does the plan.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.running.bindings import bind
from planner.models.running.executor import Executor
from planner.models.running.kv_cache import cache_among, cache_argument
from planner.models.running.masked import MaskedExecutor
from planner.models.running.patches import Patches
from planner.models.running.program import Program
from planner.models.scheduling.insertion import Insertion, end_of_prompt
from planner.models.scheduling.layouts import Layout, Taken
from planner.models.scheduling.scheduler import Scheduler
from planner.models.tokens.token_stages import Places
from planner.plan import Plan, TokenStage
from planner.planning.budgets import Budget

__all__ = ["Masking", "Scheduled", "Skipping"]

# Logits (batch, size) and limits (batch,) to what is switched on.
Decide = Callable[[Tensor, Tensor], Taken]


class Obeying(Protocol):
    """How a model is made to obey what a scheduler decided."""

    def begin(self) -> None:
        """A prompt comes; nothing is decided yet."""
        ...

    def obey(self, taken: Taken) -> Any:
        """Switch the layers to come, in the middle of the prompt's pass; what `resume` takes."""
        ...

    def resume(self, decided: Any) -> None:
        """More tokens come after a prompt for which this was decided."""
        ...

    def close(self) -> None:
        """Give the model back as it was."""
        ...


class Skipping:
    """Runs what is on, and nothing else.

    Args:
        executor: of the model.
        layout: what the switches are.
        base: token stages, the same for all samples; they come before the first switch.
        places: where the decoder's tokens are, see `TokenStages`.
    """

    def __init__(self, executor: Executor, layout: Layout, base: Plan, places: Places) -> None:
        self.executor = executor
        self.layout = layout
        self.base = base
        self._program = executor.build(base)
        executor.prepare()
        executor.follow(self._program, places)

    def begin(self) -> None:
        """See `Obeying`."""
        self.executor.resume(self._program)

    def obey(self, taken: Taken) -> Program:
        """See `Obeying`."""
        return self.executor.redirect([self.layout.plan(row, self.base) for row in taken.cpu()])

    def resume(self, decided: Program) -> None:
        """See `Obeying`."""
        if self.executor.program is not decided:
            self.executor.resume(decided)

    def close(self) -> None:
        """See `Obeying`."""
        self.executor.detach()


class Masking:
    """Runs everything and multiplies what is off by zero: for training, and as the oracle.

    Args:
        masked: of the model.
        layout: what the switches are.
        executor: has dropped tokens already where there are token stages, else None.
    """

    def __init__(self, masked: MaskedExecutor, layout: Layout, executor: Executor | None) -> None:
        self.masked = masked
        self.layout = layout
        self.executor = executor
        self._gates = ExitStack()

    def begin(self) -> None:
        """See `Obeying`."""
        self._gates.close()

    def obey(self, taken: Taken) -> Taken:
        """See `Obeying`."""
        self._gates.enter_context(self.masked.using(self.layout.gates(taken)))
        return taken

    def resume(self, decided: Taken) -> None:
        """See `Obeying`."""
        self._gates.close()
        self._gates.enter_context(self.masked.using(self.layout.gates(decided)))

    def close(self) -> None:
        """See `Obeying`."""
        self._gates.close()
        if self.executor is not None:
            self.executor.detach()


@dataclass(eq=False)
class _Session:
    """One prompt, and what was decided for it."""

    insertion: Insertion
    limits: Tensor
    decided: Any = None


class _Lengths:
    """A cache's lengths without the latency token, except for the decoder itself."""

    def __init__(self, cache: Cache) -> None:
        self.inside = False
        kind = type(cache)
        # A cache that knew itself through its own attributes would never be freed.
        known = ref(cache)

        def length(layer_idx: int = 0) -> int:
            seen = int(kind.get_seq_length(known(), layer_idx))
            return seen if self.inside or not seen else seen - 1

        def mask_sizes(query_length: int, layer_idx: int) -> tuple[int, int]:
            keys, offset = kind.get_mask_sizes(known(), query_length, layer_idx)
            whole = offset == 0 and kind.get_seq_length(known(), layer_idx) > 0
            # A window that is full stays full.
            return (keys - 1 if whole and not self.inside else keys), offset

        cache.get_seq_length, cache.get_mask_sizes = length, mask_sizes


class Scheduled:
    """One stock model under one scheduler.

    Args:
        model: a stock transformers model.
        graph: its Graph.
        scheduler: trained for it.
        mask: multiply by zero instead of skipping.
        decide: from logits and limits to what is on; by default the layout's rule.
        executor: of the model, where one exists.

    Attributes:
        taken: what was switched on for the last prompt, shape (batch, size).
        logits: the scheduler's for the last prompt, shape (batch, size).
        layout: the scheduler's, as it is for the prompts to come.
        decide: what turns logits and limits into what is on, in place of the layout's rule.
        limits: shape (1,) or (batch,): of the prompts to come, in the layout's measure.
        decisions: `taken` of every prompt since `attach`.
        at: shape (batch,): places of the latency token in the prompts to come; None for the end.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        scheduler: Scheduler,
        *,
        mask: bool = False,
        decide: Decide | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.model = model
        self.graph = graph
        self.scheduler = scheduler
        self.layout = scheduler.layout
        self.taken: Tensor | None = None
        self.logits: Tensor | None = None
        self.decisions: list[Tensor] = []
        self.at: Tensor | None = None
        self._mask = mask
        self.decide = decide
        self._executor = executor
        self._masked: MaskedExecutor | None = None
        self.limits = torch.tensor([self.layout.steps])
        self._obeying: Obeying | None = None
        self._patches = Patches()
        self._hooks = ExitStack()
        self._sessions: WeakKeyDictionary[Cache, tuple[_Session, _Lengths]] = WeakKeyDictionary()
        self._current: _Session | None = None
        self._insertion: Insertion | None = None

    @contextmanager
    def using(
        self,
        budgets: Any,
        tokens: Sequence[TokenStage] = (),
        workload: Workload | None = None,
    ) -> Iterator[None]:
        """Schedule all prompts of a block.

        Args:
            budgets: one for all samples, or a list with one per sample.
            tokens: token stages in front of the switches.
            workload: of the prompts, which budgets in cost are kept under; by default one image
                and 64 text tokens.
        """
        self.attach(budgets, tokens, workload)
        try:
            yield
        finally:
            self.detach()

    def attach(
        self,
        budgets: Any,
        tokens: Sequence[TokenStage] = (),
        workload: Workload | None = None,
    ) -> None:
        """Schedule all prompts until `detach`; arguments as for `using`.

        Raises:
            InputError: a budget that the layout cannot keep to, or stages behind the switches.
        """
        self.detach()
        several = budgets if isinstance(budgets, list | tuple) else [budgets]
        many = [Budget.of(budget) for budget in several]
        if not many:
            raise InputError("there are no budgets in the list")
        layout = self.scheduler.layout.under(workload, tokens, many[0].limits[0].metric)
        limits = torch.tensor([layout.limit(budget) for budget in many])
        self.attach_limits(limits, self.base(tokens), layout)

    def base(self, tokens: Sequence[TokenStage] = ()) -> Plan:
        """The plan with everything on but for token stages."""
        name, fingerprint = self.graph.name, str(self.graph.properties["fingerprint"])
        return Plan(name, fingerprint, self.graph.layers, tokens=tuple(tokens))

    def attach_limits(
        self, limits: Tensor, base: Plan | None = None, layout: Layout | None = None
    ) -> None:
        """As `attach`, with limits in the measure of a layout.

        Args:
            limits: shape (1,) or (batch,).
            base: with token stages.
            layout: the scheduler's, as it is for the prompts to come.
        """
        self.layout = layout or self.scheduler.layout
        self.limits = limits
        self.decisions = []
        self._obeying = self._make_obeying(base or self.base())
        decoder = cast(Any, self.model).get_decoder()
        self._stock = decoder.forward
        self._names = list(inspect.signature(self._stock).parameters)
        self._cache_argument = cache_argument(self._stock)
        self._decoder = decoder
        self._patches.set(decoder, "forward", self._forward)
        last = bind(self.model, self.graph)[self.layout.first - 1].module
        hook = last.register_forward_hook(self._after_last)
        self._hooks.callback(hook.remove)

    def detach(self) -> None:
        """Give the model back as it was."""
        self._hooks.close()
        self._patches.undo()
        if self._obeying is not None:
            self._obeying.close()
        self._obeying = None
        self._current = None

    def plans(self, base: Plan | None = None) -> list[Plan]:
        """What was decided for the last prompt, a plan per sample."""
        if self.taken is None:
            raise InputError("the scheduler has not seen a prompt yet")
        return [self.layout.plan(row, base or self.base()) for row in self.taken.bool().cpu()]

    def _make_obeying(self, base: Plan) -> Obeying:
        if self._executor is None and (base.tokens or not self._mask):
            self._executor = Executor(self.model, self.graph)
        if self._mask:
            if self._masked is None:
                self._masked = MaskedExecutor(self.model, self.graph)
            drops = self._executor if base.tokens else None
            if drops is not None:
                drops.follow(drops.build(base), self._places)
            return Masking(self._masked, self.layout, drops)
        assert self._executor is not None
        return Skipping(self._executor, self.layout, base, self._places)

    @property
    def kept_image_tokens(self) -> dict[int, list[int]]:
        """As of `Executor`; known while prompts are scheduled."""
        return {} if self._executor is None else self._executor.kept_image_tokens

    # -- in the place of the decoder's forward -----------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock decoder, on one token more."""
        assert self._obeying is not None
        kwargs.update(zip(self._names, args))
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self._decoder.get_input_embeddings()(kwargs["input_ids"])
        kwargs["input_ids"] = None
        cache = cache_among(kwargs)
        if cache is None and kwargs.get("use_cache", self._decoder.config.use_cache):
            cache = DynamicCache(config=self._decoder.config)
        if cache is not None:
            kwargs.pop("past_key_values", None)
            kwargs[self._cache_argument] = cache
        known = None if cache is None else self._sessions.get(cache)
        if known is None:
            session = self._begin(kwargs, cache)
            run = self._prompt
        else:
            session = known[0]
            self._obeying.resume(session.decided)
            run = self._more
        length = None if cache is None else self._sessions[cache][1]
        try:
            self._insertion = session.insertion
            self._current = session if known is None else None
            if length is not None:
                length.inside = True
            return run(session, kwargs, cache)
        finally:
            self._current = None
            if length is not None:
                length.inside = False

    def _begin(self, kwargs: dict[str, Any], cache: Cache | None) -> _Session:
        assert self._obeying is not None
        hidden = kwargs["inputs_embeds"]
        batch, tokens = hidden.shape[:2]
        if cache is not None and cache.get_seq_length():
            raise InputError("this cache was filled without the scheduler; start with a new cache")
        if cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers):
            raise InputError(
                "a static cache has no room for the latency token; leave cache_implementation at "
                "its default"
            )
        copies, rest = divmod(batch, len(self.limits))
        if rest:
            raise InputError(f"there are {len(self.limits)} budgets for a batch of {batch}")
        at = self.at
        if at is None:
            at = end_of_prompt(kwargs.get("attention_mask"), batch, tokens, hidden.device)
        limits = self.limits.to(hidden.device).repeat_interleave(copies)
        session = _Session(Insertion(at.to(hidden.device)), limits)
        if cache is not None:
            self._sessions[cache] = (session, _Lengths(cache))
        self._obeying.begin()
        return session

    def _places(self, known: Tensor, value: bool) -> Tensor:
        assert self._insertion is not None
        return self._insertion.into_known(known, value)

    def _prompt(self, session: _Session, kwargs: dict[str, Any], cache: Cache | None) -> Any:
        insertion = session.insertion
        token = self.scheduler.token(session.limits, self.layout.steps)
        kwargs["inputs_embeds"] = insertion.into_hidden(kwargs["inputs_embeds"], token)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = insertion.into_positions(kwargs["position_ids"])
        kwargs["attention_mask"] = _with_token(insertion, kwargs.get("attention_mask"))
        output = self._stock(**kwargs)
        output.last_hidden_state = insertion.out_of(output.last_hidden_state)
        return output

    def _more(self, session: _Session, kwargs: dict[str, Any], cache: Cache | None) -> Any:
        assert cache is not None
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        seen = cache.get_seq_length() + kwargs["inputs_embeds"].shape[1]
        mask = kwargs.get("attention_mask")
        kwargs["attention_mask"] = _with_token(session.insertion, mask, seen)
        return self._stock(**kwargs)

    def _after_last(self, _: nn.Module, args: Any, output: Tensor) -> None:
        """After the last layer that always runs: decide."""
        session = self._current
        if session is None or self._obeying is None:
            return
        self._current = None
        self.logits = self.scheduler(session.insertion.take(output))
        self.taken = (self.decide or self.layout.decide)(self.logits, session.limits)
        if not self.taken.requires_grad:
            self.decisions.append(self.taken.cpu())
        session.decided = self._obeying.obey(self.taken)


def _with_token(insertion: Insertion, mask: Any, seen: int | None = None) -> Any:
    """A decoder's attention mask, of any kind that transformers passes, with the token.

    Args:
        insertion: where the token is.
        mask: a tensor, several by kind of layer, or None.
        seen: tokens seen so far, the new ones and the latency token among them; None for a prompt.
    """
    if isinstance(mask, dict):
        return {kind: _with_token(insertion, value, seen) for kind, value in mask.items()}
    if not isinstance(mask, Tensor):
        return mask
    if mask.ndim == 2:
        return insertion.into_known(mask, 1)
    if seen is None:
        return insertion.into_mask(mask, True)
    passed = seen - 1 - mask.shape[3]
    if passed <= 0:
        return insertion.into_mask(mask, False)
    # A sliding window: its keys begin at `passed`, and it is full, so one more pushes one out.
    if bool((insertion.at < passed).any()):
        return mask
    return Insertion(insertion.at - passed).into_mask(mask, False)[..., 1:]
