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
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.lowering.decoder import decoder_of
from planner.models.running.attention_blocks import named
from planner.models.running.kv_cache import cache_among, cache_argument
from planner.models.running.masked import Gates, MaskedExecutor, TokenState
from planner.models.running.prompts import is_visual
from planner.models.running.ready import Ready
from planner.models.running.session import Setting
from planner.models.running.skipping import Skipping, session_for
from planner.models.scheduling.insertion import Insertion, end_of_prompt
from planner.models.scheduling.layouts import Layout, Taken
from planner.models.scheduling.scheduler import Scheduler
from planner.models.scheduling.token_choice import ChosenTokens, DecideTokens, best_tokens
from planner.models.scheduling.unified_layout import UnifiedSwitches
from planner.models.scheduling.vision_controller import TokenScores
from planner.models.tokens.selectors import DecoderInputs
from planner.plan import Plan, TokenStage
from planner.planning.budgets import Budget
from planner.planning.compiler import DEFAULT_DEVICE
from planner.planning.selectors import Learned

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
    chosen: ChosenTokens | None = None  # where the scheduler has a vision side
    masked: tuple[Gates, TokenState] | None = None  # the same as gates, where it masks
    decided: Any = None


class Scheduled:
    """One stock model under one scheduler.

    Args:
        mask: run everything and multiply what is off by zero: for training, and as the oracle.
        decide: from logits and limits to what is on; by default the layout's rule.
        decide_tokens: the same for image tokens, where the scheduler has a vision side.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        scheduler: Scheduler,
        *,
        mask: bool = False,
        decide: Decide | None = None,
        decide_tokens: DecideTokens | None = None,
    ) -> None:
        self.model = model
        self.graph = graph
        self.scheduler = scheduler
        self.decide = decide
        self.decide_tokens = decide_tokens
        # Of the last prompt, (batch, size): the scheduler's logits, and what was switched on.
        self.logits: Tensor | None = None
        self.taken: Tensor | None = None
        # Of the last prompt, where there is a vision side: what it said and what was chosen.
        self.scores: TokenScores | None = None
        self.chosen: ChosenTokens | None = None
        self.decisions: list[Tensor] = []  # `Layout.decision` of every prompt since `attach`
        # Of the prompts to come: the layout, limits (1,) or (batch,) in its measure, and places
        # (batch,) of the latency token, None for the end.
        self.layout = scheduler.layout
        self.limits = torch.tensor([self.layout.steps])
        self.at: Tensor | None = None
        self._mask = mask
        self._masked: MaskedExecutor | None = None
        # They stay between passes: gradient checkpointing runs layers again behind one.
        self._gates = ExitStack()
        # The decoder layers before the first switch, while prompts are scheduled.
        self.always_run: list[nn.Module] = []
        # What passes over prompts begin with: token stages; None is the base model.
        self.prompts: Ready | None = None
        self._attached = ExitStack()
        self._prompts: WeakKeyDictionary[Cache, _Prompt] = WeakKeyDictionary()
        # Of the decoder's pass that is made: its prompt, which is being read or was before.
        self._current: _Prompt | None = None
        self._is_read = False
        # What the model was called with, where image tokens have to be found.
        self._given: dict[str, Any] = {}

    @contextmanager
    def using(
        self,
        budgets: Any,
        tokens: Sequence[TokenStage] = (),
        workload: Workload | None = None,
        device: str = DEFAULT_DEVICE,
    ) -> Iterator[None]:
        """Schedule all prompts of a block; see `attach`."""
        self.attach(budgets, tokens, workload, device)
        try:
            yield
        finally:
            self.detach()

    def attach(
        self,
        budgets: Any,
        tokens: Sequence[TokenStage] = (),
        workload: Workload | None = None,
        device: str = DEFAULT_DEVICE,
    ) -> None:
        """Schedule all prompts until `detach`.

        Args:
            budgets: one for all samples, or a list with one per sample.
            workload: of the prompts, which budgets in cost are kept under; by default one image
                and 64 text tokens.
            device: that a budget in seconds is of.

        Raises InputError: a budget that the layout cannot keep to, or stages behind the switches.
        """
        self.detach()
        several = budgets if isinstance(budgets, list | tuple) else [budgets]
        many = [Budget.of(budget) for budget in several]
        if not many:
            raise InputError("there are no budgets in the list")
        layout = self.scheduler.layout.under(workload, tokens, many[0].limits[0].metric, device)
        limits = torch.tensor([layout.limit(budget) for budget in many])
        self.attach_limits(limits, self.base(tokens), layout)

    def base(self, tokens: Sequence[TokenStage] = ()) -> Plan:
        """The plan with everything on but for token stages; a vision side has one of its own."""
        if self.scheduler.vision is not None and not self._mask:
            of = int(self.graph.properties["image_tokens"])
            tokens = (TokenStage(0, of, of, str(Learned(of))),)
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
        if self.scheduler.vision is not None:
            self._watch_images(session.model)
        if self._base.tokens or self._masked is None:
            program = session.program_of(Setting((self._base,)))
            self.prompts = self._skipping.preparing.ready_always(program, self._places)
        if self._masked is None:
            self._skipping.preparing.prepare(session.graph)
        self._attached.callback(self._gates.close)
        self._decoder: Any = decoder_of(session.model)
        self._cache_argument = cache_argument(type(self._decoder).forward)
        self.always_run = [bound.module for bound in session.layers[: self.layout.first]]
        last = self.always_run[-1]
        self._attached.callback(last.register_forward_hook(self._after_last).remove)
        self._skipping.decider = self
        self._attached.callback(setattr, self._skipping, "decider", None)

    def detach(self) -> None:
        """Give the model back as it was."""
        self._attached.close()
        self.prompts = self._current = None

    def release(self, cache: Cache) -> None:
        """Leave a cache to others, to whom its latency token is a token like any other."""
        known = self._prompts.pop(cache, None)
        if known is not None and known.lengths is not None:
            del cache.__dict__["get_seq_length"], cache.__dict__["get_mask_sizes"]

    def plans(self) -> list[Plan]:
        """What was decided for the last prompt, a plan per sample."""
        if self.taken is None:
            raise InputError("the scheduler has not seen a prompt yet")
        return [self.layout.plan(row, self._base) for row in self._decision(self.taken)]

    def _decision(self, taken: Taken) -> Tensor:
        return self.layout.decision(taken, None if self.chosen is None else self.chosen.options)

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
        if known is not None and known.masked is not None:
            self._gates.enter_context(self._masked.using(*known.masked))
        if decided is not None:
            self._obey(decided)
        return self.prompts

    def _known(self, cache: Cache | None) -> _Prompt | None:
        return None if cache is None else self._prompts.get(cache)

    def _obey(self, taken: Taken) -> Any:
        """Switch the layers to come, in the middle of the prompt's pass."""
        if self._masked is None:
            return self._skipping.redirect(
                tuple(self.layout.inner.plan(row, self._base) for row in taken.cpu())
            )
        self._gates.enter_context(self._masked.using(self.layout.inner.gates(taken)))
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
        limits, steps = prompt.limits, torch.tensor(self.layout.steps)
        if self.scheduler.vision is not None:
            assert isinstance(self.layout, UnifiedSwitches)
            prompt.chosen = self._choose_tokens(self.layout, prompt, kwargs)
            limits, steps = self._left(prompt), self.layout.room[prompt.chosen.options.cpu()]
        token = self.scheduler.token(limits, steps)
        batch, tokens = kwargs["inputs_embeds"].shape[:2]
        for name, value in kwargs.items():
            # What else some decoders are told of every token, such as which ones are of an image.
            is_known = isinstance(value, Tensor) and value.shape == (batch, tokens)
            if is_known and name not in ("attention_mask", "position_ids"):
                kwargs[name] = insertion.into_known(value, 0)
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
        if self.prompts is not None and self.prompts.stages is not None:
            # Of pictures in later turns everything is kept.
            self.prompts.stages.chosen = torch.ones_like(kwargs["inputs_embeds"][..., 0]).bool()

    # -- image tokens --------------------------------------------------------------------------

    def _watch_images(self, model: nn.Module) -> None:
        """Note what the model is called with: its ids say where images are."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._given = named(module, args, kwargs)

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        self._attached.callback(handle.remove)

    def _choose_tokens(
        self, layout: UnifiedSwitches, prompt: _Prompt, kwargs: dict[str, Any]
    ) -> ChosenTokens:
        """Have the vision side choose what the decoder sees of a prompt's images."""
        hidden, ids = kwargs["inputs_embeds"], self._given.pop("input_ids", None)
        if ids is None or ids.shape != hidden.shape[:2]:
            raise InputError(
                "a scheduler finds the images by their tokens: call the whole model, with "
                "input_ids rather than inputs_embeds"
            )
        image = is_visual(ids.to(hidden.device), self.model)
        valid = torch.ones_like(image)
        mask = self._given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            valid = mask.to(hidden.device).bool()
        places = torch.arange(hidden.shape[1], device=hidden.device)
        # In training the answer follows, which no one knows when asked.
        words = valid & ~image & (places < prompt.insertion.at[:, None])
        assert self.scheduler.vision is not None
        share = prompt.limits / max(1, layout.steps)
        self.scores = self.scheduler.vision(hidden, image, words, share)
        decide = self.decide_tokens or partial(best_tokens, layout)
        inputs = DecoderInputs(image, valid, hidden_states=hidden)
        self.chosen = chosen = decide(self.scores, prompt.limits, inputs)
        keep = prompt.insertion.into_known(chosen.keep, 1)
        if self._masked is None:
            assert self.prompts is not None
            if self.prompts.stages is not None:
                self.prompts.stages.chosen = keep.bool()
        else:
            gates = Gates(tokens={0: keep.to(hidden.dtype)})
            prompt.masked = gates, TokenState()
            self._gates.enter_context(self._masked.using(*prompt.masked))
        return chosen

    def _left(self, prompt: _Prompt) -> Tensor:
        """What a prompt's limits leave for the switches that logits stand for."""
        if prompt.chosen is None:
            return prompt.limits
        assert isinstance(self.layout, UnifiedSwitches)
        return self.layout.left(prompt.limits, prompt.chosen.options)

    # -- switches ------------------------------------------------------------------------------

    def _after_last(self, _: nn.Module, args: Any, output: Tensor) -> None:
        """After the last layer that always runs: decide."""
        prompt = self._current
        if prompt is None or self._is_read:
            return
        self.logits = self.scheduler(prompt.insertion.take(output))
        decide: Any = self.decide or self.layout.decide
        if self.decide is None and prompt.chosen is not None:
            decide = partial(decide, options=prompt.chosen.options)
        self.taken = decide(self.logits, self._left(prompt))
        if not self.taken.requires_grad:
            self.decisions.append(self._decision(self.taken))
        prompt.decided = self._obey(self.taken)
