"""A forward pass of the decoder under a program: what all its layers need to know of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from planner.ir.errors import InputError
from planner.models.running.attention_calls import Recorded
from planner.models.running.cache_layers import Cached, PlannedLayer
from planner.models.running.kv_cache import (
    cache_among,
    check_encoded,
    first_keyed,
    plan_cache,
    redirect_cache,
    tokens_seen,
)
from planner.models.running.program import LayerGroup, Program
from planner.models.tokens.kept_tokens import Kept, gather
from planner.planning.selectors import Selector

if TYPE_CHECKING:
    from planner.models.running.layers import LayerForward
    from planner.models.tokens.answer_stage import AnswerStage
    from planner.models.tokens.summed_up import SummedUp, SummingStage
    from planner.models.tokens.token_stages import TokenStages


@dataclass(eq=False)
class Call:
    """One forward pass, from the first layer to the last; tensors are bool, (batch, tokens)."""

    batch: int
    tokens: int  # of this pass, before any is dropped
    device: torch.device
    past: int  # tokens before them
    drafts: int = field(default=0, kw_only=True)  # how many of the last an assistant has guessed
    cache: list[Cached] | None
    rows: list[list[Tensor | None]]  # of the batch, for each layer and group; None for all
    image: Tensor | None = None  # None where no image token is among them
    valid: Tensor | None = None  # (batch, past + tokens): False for padding, None without any
    unwanted: Tensor | None = None  # what a vision selector dropped; None without one
    left: Tensor | None = None  # tokens not dropped; None before the first stage
    kept: Kept | None = None  # the same as indices
    # (batch, tokens): the answer so far that a pass without a cache repeats, but its last token.
    answer: Tensor | None = None
    stored: Tensor | None = None  # (batch,): whether the one token is cached; None: it is
    summed_up: SummedUp | None = None  # where VoCo tokens are; None without any
    # int64: tokens up to each that position ids no longer count; None where they count all.
    gaps: Tensor | None = None
    marks: dict[Selector, Tensor] = field(default_factory=dict)  # before layer 0
    records: dict[int, list[Recorded]] = field(default_factory=dict)  # of attention, by layer

    @property
    def first_cached(self) -> PlannedLayer | None:
        """The first layer of the cache that has keys, None where there is none."""
        return first_keyed(self.cache or ())

    def has_dropped(self, group: LayerGroup) -> bool:
        """Whether tokens are gone that a group's last stage is to choose from."""
        return self.kept is not None and (len(group.stages) > 1 or self.answer is not None)

    def new_valid(self) -> Tensor:
        """Which of this pass's tokens are no padding, shape (batch, tokens), bool."""
        if self.valid is None:
            return torch.ones(self.batch, self.tokens, dtype=torch.bool, device=self.device)
        return self.valid[:, -self.tokens :].clone()

    def prompt(self) -> Tensor:
        """Which of them are the prompt's own."""
        own = self.new_valid()
        own[:, self.tokens - self.drafts :] = False
        return own


class Enough(Exception):
    """Ends the run of an attention block that is only asked what it computes with."""


class Passes:
    """Begins a `Call` at the first layer, shows it to all layers and ends it at the last."""

    def __init__(self, program: Program, stages: TokenStages | None) -> None:
        self.program = program
        self.stages = stages
        self.answers: AnswerStage | None = None
        self.summing: SummingStage | None = None
        self.current: Call | None = None
        # Batch rows that a layer is running for, which keys are no padding, and places of the
        # tokens in the pass; None for all.
        self.serving: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        # Whether attention blocks run no further than to what they compute with.
        self.only_records = False
        # What stands in for the layers, in model order; the decoder's rotary embedding.
        self.layers: list[LayerForward] = []
        self.rotary: nn.Module | None = None
        # What the attention block computed with that ran last, where somebody asks.
        self.seen: Recorded | None = None
        self._rows: dict[tuple[int, torch.device], list[list[Tensor | None]]] = {}

    def begin(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Begin a forward pass with what the decoder hands layer 0.

        Returns the hidden states without marks of a vision selector; raises InputError where the
        inputs do not go with the plan, or hold values that are not finite.
        """
        self.serving = (None, None, None)
        batch, tokens = hidden.shape[:2]
        rows = self._rows_of(batch, hidden.device)
        check_encoded(kwargs, self.program)
        cache = cache_among(kwargs)
        layers = None if cache is None else plan_cache(cache, self.program, rows, hidden)
        call = Call(batch, tokens, hidden.device, tokens_seen(layers or ()), layers, rows)
        if tokens > 1 or not call.past:
            if self.stages is not None:
                hidden = self.stages.enter(call, hidden)
            if self.answers is not None:
                self.answers.enter(call)
            if self.summing is not None:
                self.summing.enter(call)
            # Under torch.compile the look at values would break the graph.
            if not torch.compiler.is_compiling() and not torch.isfinite(hidden).all():
                raise InputError(
                    "the prompt's embeddings are not all finite numbers; look for NaN or infinity "
                    "in the image"
                )
        self.current = call
        return hidden

    def take_over(self, other: Passes) -> None:
        """Go on with a pass that another program began; the layers to come obey this one."""
        call = other.current
        assert call is not None
        call.rows = self._rows_of(call.batch, call.device)
        if call.cache is not None:
            redirect_cache(call.cache, self.program, call.rows)
        self.current = call

    def gather(self, hidden: Tensor, index: Tensor) -> Tensor:
        """The hidden states of the tokens that are left: `Kept.index` of (rows, tokens, width)."""
        if self.stages is not None:
            return self.stages.gather(hidden, index)
        return gather(hidden, index, -2)

    def evict(self, layer: int, group: int) -> None:
        """Let a layer's cache evict, once its attention block has run for a group."""
        seen, self.seen = self.seen, None
        assert self.current is not None
        cached = None if self.current.cache is None else self.current.cache[layer]
        if not isinstance(cached, PlannedLayer):
            return
        cached.evict(layer, group, seen, self.current)

    def end(self) -> None:
        """Let go of the pass, and with it of the cache."""
        self.current = self.seen = None

    def record(self, layer: int, seen: Recorded) -> None:
        """Note what a layer's attention block computes with, for its cache or a later selector."""
        self.seen = seen
        if self.only_records:
            rows, valid, places = self.serving
            assert self.current is not None
            record = replace(seen, rows=rows, valid=valid, places=places)
            self.current.records.setdefault(layer, []).append(record)
            raise Enough
        scored = self.stages is not None and layer in self.stages.recorded
        if scored and self.current is not None and self.current.image is not None:
            rows, valid, places = self.serving
            record = replace(seen, rows=rows, valid=valid, places=places)
            self.current.records.setdefault(layer, []).append(record)

    def _rows_of(self, batch: int, device: torch.device) -> list[list[Tensor | None]]:
        """Batch rows by layer and group, None for all; under beam search a sample has several."""
        key = (batch, device)
        if key not in self._rows:
            plans = len(self.program.plans)
            copies, rest = divmod(batch, plans)
            if rest:
                raise InputError(
                    f"there are {plans} plans for a batch of {batch}; give one for each"
                )
            samples = torch.arange(batch, device=device).view(plans, copies)
            self._rows[key] = [
                [
                    None if len(layer.groups) == 1 else samples[list(group.samples)].flatten()
                    for group in layer.groups
                ]
                for layer in self.program.layers
            ]
        return self._rows[key]
