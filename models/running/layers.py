"""What stands in for `forward` of layers and attention blocks while a plan is active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.output_capturing import _active_collector

from planner.ir.errors import InputError
from planner.ir.intervals import Intervals
from planner.models.running.attention_blocks import AttentionBlock, headless, named, names_of
from planner.models.running.bindings import BoundSite
from planner.models.running.forward_pass import Call, Passes
from planner.models.running.kv_cache import Cached
from planner.models.running.layer_results import LayerResult, hidden_of, with_hidden
from planner.models.running.patches import Shadow
from planner.models.running.products import BlockForward, Product
from planner.models.running.program import LayerGroup, LayerProgram
from planner.models.tokens.kept_tokens import (
    Kept,
    Keys,
    narrow_argument,
    narrow_mask,
    scatter,
    select_rows,
)


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
            return self.stock(**self.block.narrowed(given, self.kept))
        added = given.get(self.block.added)
        hidden = next(iter(given.values()))
        return headless(hidden, self.site.sink.bias, self.block.output, added)


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
            cached.advance(call.tokens)
        if not self.setups[0].group.on:
            return self.result.left_out(hidden, kwargs)
        return self.stock(hidden, **kwargs)

    def _run_groups(
        self, call: Call, hidden: Tensor, kwargs: dict[str, Any], cached: Cached | None
    ) -> Any:
        """Every group on its own rows and on the tokens that are left of them."""
        rows_of = call.rows[self.index]
        for setup, rows in zip(self.setups, rows_of, strict=True):
            stages = setup.group.stages
            # Decoded tokens pass by a stage: what is compiled for them need not break here.
            if call.image is not None and stages and stages[-1].layer == self.index:
                assert self.passes.stages is not None
                hidden = self.passes.stages.select(call, setup.group, rows, hidden)
        output, returned = hidden.clone(), self.result.left_out(hidden, kwargs)
        for number, (setup, rows) in enumerate(zip(self.setups, rows_of, strict=True)):
            if not setup.group.on:
                continue
            kept = None
            if setup.group.stages and call.kept is not None:
                kept = call.kept.rows(rows)
            inputs = select_rows(hidden, rows, 0) if call.batch > 1 else hidden
            if kept is not None:
                assert self.passes.stages is not None
                inputs = self.passes.stages.gather(inputs, kept.index)
            keys = None
            if setup.group.has_keys:
                keys = _keys(call, number, inputs, kept, cached)
            setup.activate()
            self.setup = setup
            if cached is not None:
                cached.begin(number)
            self.passes.serving = (rows, None if keys is None else keys.positions >= 0)
            returned = self.stock(inputs, **self._narrowed(call, kwargs, rows, kept, keys))
            output = scatter(output, rows, kept, hidden_of(returned))
            if setup.group.kv is not None:
                self.passes.evict(self.index, number)
        if cached is not None:
            cached.advance(call.tokens)
        return with_hidden(returned, output, whole=len(self.setups) == 1)

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


def _attentions_asked() -> list[Tensor]:
    """The attention weights of the layers so far, which stock code collects; its own list."""
    if torch.compiler.is_compiling():
        return []
    collected = _active_collector.get() or {}
    found: list[Tensor] = collected.get("attentions", [])
    return found


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
