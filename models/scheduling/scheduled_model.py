"""A model running under a scheduler: every prompt gets its own plan while it is being read.

    with Scheduled(model, graph, scheduler).using(0.65):
        model.generate(**inputs)

Behind the back of the stock code a latency token is appended to the prompt. When the layers that
always run are through, the scheduler turns that token's hidden states into one plan per sample, and
the rest of the decoder obeys. The token stays in the KV cache, and so does the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.running.attention_blocks import named
from planner.models.running.kv_cache import cache_among, cache_argument
from planner.models.running.masked import MaskedExecutor
from planner.models.running.ready import Ready
from planner.models.running.session import Setting
from planner.models.running.skipping import Skipping, session_for
from planner.models.scheduling.insertion import Insertion, end_of_prompt
from planner.models.scheduling.layouts import Layout, Taken
from planner.models.scheduling.scheduler import Scheduler
from planner.plan import Plan, TokenStage
from planner.planning.budgets import Budget

# Logits (batch, size) and limits (batch,) to what is switched on.
Decide = Callable[[Tensor, Tensor], Taken]


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


@dataclass(eq=False)
class _Prompt:
    """One prompt, and what was decided for it: what a pass over more tokens begins with, or gates.

    Its cache, if any, tells lengths without the latency token.
    """

    insertion: Insertion
    limits: Tensor
    lengths: _Lengths | None
    decided: Any = None


class Scheduled:
    """One stock model under one scheduler.

    Args:
        mask: run everything and multiply what is off by zero: for training, and as the oracle.
        decide: from logits and limits to what is on; by default the layout's rule.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        scheduler: Scheduler,
        *,
        mask: bool = False,
        decide: Decide | None = None,
    ) -> None:
        self.model = model
        self.graph = graph
        self.scheduler = scheduler
        self.decide = decide
        # Of the last prompt, (batch, size): the scheduler's logits, and what was switched on.
        self.logits: Tensor | None = None
        self.taken: Tensor | None = None
        self.decisions: list[Tensor] = []  # `taken` of every prompt since `attach`
        # Of the prompts to come: the layout, limits (1,) or (batch,) in its measure, and places
        # (batch,) of the latency token, None for the end.
        self.layout = scheduler.layout
        self.limits = torch.tensor([self.layout.steps])
        self.at: Tensor | None = None
        self._mask = mask
        self._masked: MaskedExecutor | None = None
        # They stay between passes: gradient checkpointing runs layers again behind one.
        self._gates = ExitStack()
        # What passes over prompts begin with: token stages; None is the base model.
        self.prompts: Ready | None = None
        self._attached = ExitStack()
        self._prompts: WeakKeyDictionary[Cache, _Prompt] = WeakKeyDictionary()
        # Of the decoder's pass that is made: its prompt, which is being read or was before.
        self._current: _Prompt | None = None
        self._is_read = False

    @contextmanager
    def using(
        self,
        budgets: Any,
        tokens: Sequence[TokenStage] = (),
        workload: Workload | None = None,
    ) -> Iterator[None]:
        """Schedule all prompts of a block; see `attach`."""
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
        """Schedule all prompts until `detach`.

        Args:
            budgets: one for all samples, or a list with one per sample.
            tokens: token stages in front of the switches.
            workload: of the prompts, which budgets in cost are kept under; by default one image
                and 64 text tokens.

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
        return Plan.of(self.graph, tokens=tuple(tokens))

    def attach_limits(
        self, limits: Tensor, base: Plan | None = None, layout: Layout | None = None
    ) -> None:
        """As `attach`, with limits, shape (1,) or (batch,), in the measure of a layout.

        `base` has the token stages; `layout` is the scheduler's, as it is for the prompts to come.
        """
        self.layout = layout or self.scheduler.layout
        self.limits = limits
        self.decisions = []
        session = self._attached.enter_context(session_for(self.model, self.graph))
        self._skipping: Skipping = session.implementation
        self._masked = MaskedExecutor(self.model, self.graph) if self._mask else None
        self._base = base or self.base()
        if self._base.tokens or self._masked is None:
            program = session.program_of(Setting((self._base,)))
            self.prompts = self._skipping.preparing.ready_always(program, self._places)
        if self._masked is None:
            self._skipping.preparing.prepare(session.graph)
        self._attached.callback(self._gates.close)
        self._decoder: Any = cast(Any, session.model).get_decoder()
        self._cache_argument = cache_argument(type(self._decoder).forward)
        last = session.layers[self.layout.first - 1].module
        self._attached.callback(last.register_forward_hook(self._after_last).remove)
        self._skipping.decider = self
        self._attached.callback(setattr, self._skipping, "decider", None)

    def detach(self) -> None:
        """Give the model back as it was."""
        self._attached.close()
        self.prompts = self._current = None

    def plans(self) -> list[Plan]:
        """What was decided for the last prompt, a plan per sample."""
        if self.taken is None:
            raise InputError("the scheduler has not seen a prompt yet")
        return [self.layout.plan(row, self._base) for row in self.taken]

    @property
    def kept_image_tokens(self) -> dict[int, list[int]]:
        """As `planner.kept_image_tokens`; known while prompts are scheduled."""
        return {} if self.prompts is None else self.prompts.kept_image_tokens

    def ready_for(self, kwargs: dict[str, Any]) -> Ready | None:
        """What a pass begins with: what was decided for its cache, everything for a new prompt."""
        known = self._known(cache_among(kwargs))
        decided = None if known is None else known.decided
        if self._masked is None:
            return decided or self.prompts
        self._gates.close()
        if decided is not None:
            self._obey(decided)
        return self.prompts

    def _known(self, cache: Cache | None) -> _Prompt | None:
        return None if cache is None else self._prompts.get(cache)

    def _obey(self, taken: Taken) -> Any:
        """Switch the layers to come, in the middle of the prompt's pass."""
        if self._masked is None:
            return self._skipping.redirect(
                tuple(self.layout.plan(row, self._base) for row in taken.cpu())
            )
        self._gates.enter_context(self._masked.using(self.layout.gates(taken)))
        return taken

    def enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The decoder's arguments, on one token more."""
        kwargs = named(self._decoder, args, kwargs)
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self._decoder.get_input_embeddings()(kwargs["input_ids"])
        kwargs["input_ids"] = None
        cache = cache_among(kwargs)
        if cache is None and kwargs.get("use_cache", self._decoder.config.use_cache):
            cache = DynamicCache(config=self._decoder.config)
        if cache is not None:
            kwargs.pop("past_key_values", None)
            kwargs[self._cache_argument] = cache
        known = self._known(cache)
        self._is_read = known is not None
        self._current = prompt = known or self._begin(kwargs, cache)
        if known is None:
            self._with_prompt(prompt, kwargs)
        else:
            assert cache is not None
            self._with_more(prompt, kwargs, cache)
        if prompt.lengths is not None:
            prompt.lengths.inside = True
        return (), kwargs

    def leave(self, output: Any) -> Any:
        """The decoder's output as if without the token."""
        prompt, self._current = self._current, None
        if prompt is not None and prompt.lengths is not None:
            prompt.lengths.inside = False
        if output is not None and prompt is not None and not self._is_read:
            output.last_hidden_state = prompt.insertion.out_of(output.last_hidden_state)
        return output

    def _begin(self, kwargs: dict[str, Any], cache: Cache | None) -> _Prompt:
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
        lengths = None if cache is None else _Lengths(cache)
        prompt = _Prompt(Insertion(at.to(hidden.device)), limits, lengths)
        if cache is not None:
            self._prompts[cache] = prompt
        return prompt

    def _places(self, known: Tensor, value: bool) -> Tensor:
        assert self._current is not None
        return self._current.insertion.into_known(known, value)

    def _with_prompt(self, prompt: _Prompt, kwargs: dict[str, Any]) -> None:
        """Put the token into a prompt's arguments."""
        insertion = prompt.insertion
        token = self.scheduler.token(prompt.limits, self.layout.steps)
        kwargs["inputs_embeds"] = insertion.into_hidden(kwargs["inputs_embeds"], token)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = insertion.into_positions(kwargs["position_ids"])
        kwargs["attention_mask"] = insertion.into_any_mask(kwargs.get("attention_mask"))

    def _with_more(self, prompt: _Prompt, kwargs: dict[str, Any], cache: Cache) -> None:
        """Count the token that the cache holds in the arguments of what follows."""
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        # The decoder has not begun: lengths are told without the token.
        seen = cache.get_seq_length() + 1 + kwargs["inputs_embeds"].shape[1]
        mask = kwargs.get("attention_mask")
        kwargs["attention_mask"] = prompt.insertion.into_any_mask(mask, seen)

    def _after_last(self, _: nn.Module, args: Any, output: Tensor) -> None:
        """After the last layer that always runs: decide."""
        prompt = self._current
        if prompt is None or self._is_read:
            return
        self.logits = self.scheduler(prompt.insertion.take(output))
        self.taken = (self.decide or self.layout.decide)(self.logits, prompt.limits)
        if not self.taken.requires_grad:
            self.decisions.append(self.taken.cpu())
        prompt.decided = self._obey(self.taken)
