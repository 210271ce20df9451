"""What stands in for `forward` of layers and attention blocks while a plan is active."""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.output_capturing import _active_collector

from planner.ir.errors import InputError
from planner.ir.intervals import Intervals, count_of
from planner.models.running.attention_blocks import AttentionBlock, headless, named, names_of
from planner.models.running.bindings import BoundSite
from planner.models.running.cache_layers import Cached
from planner.models.running.forward_pass import Call, Enough, Passes
from planner.models.running.layer_results import LayerResult, hidden_of, with_hidden
from planner.models.running.patches import Shadow
from planner.models.running.products import BlockForward, Product
from planner.models.running.program import LayerGroup, LayerProgram
from planner.models.tokens.answer_stage import tally_of
from planner.models.tokens.kept_tokens import (
    Kept,
    Keys,
    gather,
    narrow_argument,
    narrow_mask,
    scatter,
    select_rows,
)
from planner.planning.selectors import AnswerPolicy, VoCo


class AttentionForward(Shadow):
    """Stands in for an attention block, and gives it the arguments of the heads that are left.

    With no head left it gives the bias of its last linear.
    """

    def __init__(self, site: BoundSite, block: AttentionBlock) -> None:
        self.site = site
        self.block = block
        self.kept: Intervals | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock block."""
        if self.kept is None:
            return self.stock(*args, **kwargs)
        given = named(self.site.module, args, kwargs)
        if self.kept:
            return self.block.run(self.site.module, self.stock, given, self.kept)
        hidden, sink, block = next(iter(given.values())), self.site.sink, self.block
        if self.site.projects:
            result = headless(hidden, sink.bias, block.output, given.get(block.added))
        else:
            # The linear behind it adds its bias.
            result = headless(hidden[..., : count_of(sink.shared)], None, block.output)
        if not isinstance(result, tuple):
            return result
        places = zip(result, block.handed_on, strict=True)
        return tuple(given[name] if name else value for value, name in places)


@dataclass(frozen=True, eq=False)
class Setup:
    """How to run a layer for one group."""

    group: LayerGroup
    products: tuple[tuple[BlockForward, Product | None], ...]
    heads: BoundSite | None
    attributes: dict[str, Any]  # the attention block's own for this group: head counts, config
    # Stands in for the block where its arguments are by head, or some group has no head left.
    attention: AttentionForward | None

    def compute(self) -> None:
        """Make what stands in for the layer's modules compute what this group keeps."""
        for forward, product in self.products:
            forward.active = product
        if self.attention is not None:
            self.attention.kept = self.group.heads

    def activate(self) -> None:
        """Make the layer run for this group."""
        self.compute()
        if self.heads is not None:
            self.heads.module.__dict__.update(self.attributes)


class LayerForward(Shadow):
    """Stands in for one decoder layer: runs the stock layer once per group, on what is left."""

    def __init__(
        self, passes: Passes, program: LayerProgram, setups: tuple[Setup, ...], result: LayerResult
    ) -> None:
        self.passes = passes
        self.result = result
        self.index = program.layer.index
        self.is_last = program is passes.program.layers[-1]
        self.setups = setups
        self.layer_class = type(program.layer.module)
        self.names = names_of(self.layer_class)
        # How the layer runs now.
        self.setup = setups[0]
        self.is_simple = len(setups) == 1 and not setups[0].group.has_keys
        heads = program.layer.heads
        self.block: Any = None if heads is None else heads.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock layer: hidden states of shape (batch, tokens, width) come first."""
        kwargs.update(zip(self.names, args))
        hidden = kwargs.pop(self.names[0])
        if self.index == 0:
            hidden = self.passes.begin(hidden, kwargs)
        call = self.passes.current
        if call is None:
            raise InputError("a layer was called by itself; under a plan call the whole model")
        cached = None if call.cache is None else call.cache[self.index]
        run = self._run_simple if self.is_simple else self._run_groups
        attentions = _attentions_asked()
        known = len(attentions)
        output = run(call, hidden, kwargs, cached)
        self._keep_one(attentions, known, call, hidden)
        if self.is_last:
            self.passes.end()
        return output

    def _keep_one(self, attentions: list[Tensor], known: int, call: Call, hidden: Tensor) -> None:
        """Have attention weights that are asked for hold one entry of this layer: of no head, too.

        Where attention is computed without weights, stock code leaves all entries out.
        """
        if len(attentions) > known + 1:
            raise InputError(
                "output_attentions cannot put together what the plans of several samples attend "
                "to; ask for one sample at a time"
            )
        if self._attention == "eager" and known == len(attentions) == self.index:
            keys = call.past + call.tokens
            attentions.append(hidden.new_zeros(call.batch, 0, call.tokens, keys))

    @property
    def _attention(self) -> str:
        """The name of the function that attention is configured to be computed by."""
        config = getattr(self.block, "config", None)
        config = getattr(config, "original_config", config)
        return str(getattr(config, "_attn_implementation", ""))

    def _run_simple(
        self, call: Call, hidden: Tensor, kwargs: dict[str, Any], cached: Cached | None
    ) -> Any:
        """One group, no token dropped."""
        if cached is not None:
            cached.begin(0)
        if self.setups[0].group.on:
            output = self.stock(hidden, **kwargs)
        else:
            output = self.result.left_out(hidden, kwargs)
        if cached is not None:
            # Not before: T5's layers ask how many tokens have passed.
            cached.advance(call.tokens)
        return output

    def _run_groups(
        self, call: Call, hidden: Tensor, kwargs: dict[str, Any], cached: Cached | None
    ) -> Any:
        """Every group on its own rows and on the tokens that are left of them."""
        rows_of = call.rows[self.index]
        for number, (setup, rows) in enumerate(zip(self.setups, rows_of, strict=True)):
            stages = setup.group.stages
            # Decoded tokens pass by a stage: what is compiled for them need not break here.
            if call.image is not None and stages and stages[-1].layer == self.index:
                assert self.passes.stages is not None
                self._look_ahead(call, setup.group, rows, hidden, kwargs)
                hidden = self.passes.stages.select(call, setup.group, rows, hidden)
            policy = setup.group.kv
            if isinstance(policy, AnswerPolicy) and policy.layer == self.index:
                assert self.passes.answers is not None
                tally = tally_of(cached, number)
                self.passes.answers.decide(call, policy, rows, hidden, tally)
        output, returned = hidden.clone(), self.result.left_out(hidden, kwargs)
        for number, (setup, rows) in enumerate(zip(self.setups, rows_of, strict=True)):
            if not setup.group.on:
                continue
            kept = None
            if setup.group.drops and call.kept is not None:
                kept = call.kept.rows(rows)
            inputs = select_rows(hidden, rows, 0) if call.batch > 1 else hidden
            if kept is not None:
                inputs = self.passes.gather(inputs, kept.index)
            keys = None
            if setup.group.has_keys:
                keys = _keys(call, number, inputs, kept, cached)
            setup.activate()
            self.setup = setup
            if cached is not None:
                cached.begin(number)
            self.passes.serving = _serving(rows, keys, kept)
            arguments = self._narrowed(call, kwargs, rows, kept, keys)
            if isinstance(setup.group.kv, VoCo) and call.summed_up is not None:
                mask = self._summed_up(call, arguments["attention_mask"], rows, kept, keys)
                arguments["attention_mask"] = mask
            if setup.group.renumbered:
                gaps, dropped = _gaps(call, rows, kept)
                before = None if cached is None else cached.shift(number, dropped)
                self._renumber(arguments, inputs, gaps, before)
            returned = self.stock(inputs, **arguments)
            output = scatter(output, rows, kept, hidden_of(returned))
            if setup.group.kv is not None:
                self.passes.evict(self.index, number)
        if cached is not None:
            cached.advance(call.tokens)
        return with_hidden(returned, output, whole=len(self.setups) == 1)

    def _look_ahead(
        self,
        call: Call,
        group: LayerGroup,
        rows: Tensor | None,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Have the next layer that attends record what it would score a group's tokens with."""
        stage, stages = group.stages[-1], self.passes.stages
        if stages is None or stage not in stages.look_ahead:
            return
        for index in self.passes.program.scored_by(stage):
            layer = self.passes.layers[index]
            for number, theirs in enumerate(call.rows[index]):
                part = theirs
                if rows is not None:
                    part = rows if theirs is None else rows[torch.isin(rows, theirs)]
                if part is None or len(part):
                    layer.record(call, number, part, call.has_dropped(group), hidden, kwargs)

    def record(
        self,
        call: Call,
        number: int,
        rows: Tensor | None,
        earlier: bool,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Run a group as far as its attention, on rows of it, and note what that is given.

        `earlier`: whether a stage has dropped tokens of these rows before.
        """
        kept = call.kept.rows(rows) if earlier and call.kept is not None else None
        inputs = select_rows(hidden, rows, 0)
        if kept is not None:
            inputs = gather(inputs, kept.index, -2)
        keys = _keys(call, number, inputs, kept, None)
        given = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
        arguments = self._narrowed(call, given, rows, kept, keys)
        if call.gaps is not None:
            self._renumber(arguments, inputs, _gaps(call, rows, kept)[0], None)
        self.setups[number].activate()
        self.passes.serving = _serving(rows, keys, kept)
        self.passes.only_records = True
        try:
            with suppress(Enough):
                self.stock(inputs, **arguments)
        finally:
            self.passes.only_records = False

    def _renumber(
        self, arguments: dict[str, Any], inputs: Tensor, gaps: Tensor | None, before: Tensor | None
    ) -> None:
        """Change position ids among a layer's arguments, and what was made of them.

        `gaps`, shape (rows, tokens), were dropped in this pass, `before`, shape (rows,), in earlier
        ones; None for none.
        """
        ids, rotary = arguments.get("position_ids"), self.passes.rotary
        sections = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
        if not isinstance(ids, Tensor) or ids.ndim != 2 or "mrope_section" in sections:
            raise InputError(
                "this model's tokens have no position ids that could be made contiguous; give the "
                "selector positions=original"
            )
        for shift in (gaps, None if before is None else before[:, None]):
            ids = ids if shift is None else ids - shift
        arguments["position_ids"] = ids
        if "position_embeddings" in arguments and rotary is not None:
            kinds = {"layer_type": getattr(self.block, "layer_type", None)}
            taken = inspect.signature(rotary.forward).parameters
            kinds = {name: kind for name, kind in kinds.items() if name in taken}
            arguments["position_embeddings"] = rotary(inputs, ids, **kinds)

    def _narrowed(
        self,
        call: Call,
        kwargs: dict[str, Any],
        rows: Tensor | None,
        kept: Kept | None,
        keys: Keys | None,
    ) -> dict[str, Any]:
        """The layer's other arguments, for the rows and tokens of a group."""
        index = None if kept is None else kept.index
        seen = call.past + call.tokens
        flash = "flash" in self._attention
        narrowed = {
            name: narrow_argument(
                value, call.batch, call.tokens, rows, index, self.result.leading.get(name)
            )
            for name, value in kwargs.items()
        }
        if "attention_mask" in kwargs:
            causal = getattr(self.block, "is_causal", True)
            narrowed["attention_mask"] = narrow_mask(
                kwargs["attention_mask"], rows, index, keys, seen, causal=causal, flash=flash
            )
        if flash and index is not None and "position_embeddings" in kwargs:
            # Gaps in position ids would be taken for borders between packed sequences.
            narrowed["position_ids"] = None
        return narrowed

    def _summed_up(
        self,
        call: Call,
        mask: Tensor | None,
        rows: Tensor | None,
        kept: Kept | None,
        keys: Keys | None,
    ) -> Tensor:
        """A group's mask with the image hidden from what is behind its VoCo tokens."""
        if "flash" in self._attention:
            raise InputError(
                "voco hides an image from some tokens, which flash attention has no masks for: "
                "load the model with attn_implementation='sdpa'"
            )
        assert call.summed_up is not None
        every = torch.arange(call.tokens, device=call.device)[None]
        places = every if keys is None else keys.positions
        return call.summed_up.narrow(mask, every if kept is None else kept.index, places, rows)


def _attentions_asked() -> list[Tensor]:
    """The attention weights of the layers so far, which stock code collects; its own list."""
    if torch.compiler.is_compiling():
        return []
    collected = _active_collector.get() or {}
    found: list[Tensor] = collected.get("attentions", [])
    return found


def _gaps(
    call: Call, rows: Tensor | None, kept: Kept | None
) -> tuple[Tensor | None, Tensor | None]:
    """What position ids no longer count: up to each token left, shape (rows, left), and in all."""
    if call.gaps is None:
        return None, None
    own = select_rows(call.gaps, rows, 0)
    return own if kept is None else gather(own, kept.index, -1), own[:, -1]


def _serving(
    rows: Tensor | None, keys: Keys | None, kept: Kept | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Batch rows that a layer runs for, which keys are no padding, and places of the tokens."""
    valid = None if keys is None else keys.positions >= 0
    return rows, valid, None if kept is None else kept.index


def _keys(
    call: Call, group: int, inputs: Tensor, kept: Kept | None, cached: Cached | None
) -> Keys | None:
    """What the tokens of a group can attend to in a layer that has keys for some only."""
    if kept is not None:
        positions, padded = kept.positions(call.past), kept.is_ragged
    elif cached is None:
        return None
    else:
        new = torch.arange(call.past, call.past + call.tokens, device=inputs.device)
        positions, padded = new.expand(len(inputs), -1), False
    return Keys(positions, padded) if cached is None else cached.remember(group, positions, padded)
