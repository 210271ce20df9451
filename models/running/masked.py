"""Plans by masks: everything runs, and what is off is multiplied by zero.

The oracle that skipping is tested against, and what training differentiates: gates are real
tensors, one per sample and switch, 1 for on and 0 for off, and gradients reach them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from operator import mul
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.intervals import numbers_of
from planner.ir.structure import residual_branches
from planner.models.running.bindings import BoundLayer, BoundSite, bind
from planner.models.running.kv_cache import cache_among
from planner.models.running.layer_results import hidden_of, with_hidden
from planner.models.running.patches import ConfigView, Patches
from planner.models.running.program import check_plan
from planner.plan import Plan

MASKED = "planner_masked"

# Gates of a prompt's tokens, shape (batch, tokens), or what computes them from the hidden states
# that are about to enter the layer, shape (batch, tokens, width).
TokenGates = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Gates:
    """How far everything is on by layer, sample by sample; what is absent is on.

    A layer's gate multiplies what each branch adds to the stream, attention and MLP apart, as
    AdaLLaVA's code has it: the gradient differs from that of a gate on the layer as a whole.
    """

    layers: Mapping[int, Tensor] = field(default_factory=dict)  # (batch,)
    heads: Mapping[int, Tensor] = field(default_factory=dict)  # (batch, switches)
    # (batch, switches); the neurons are divided evenly, see `Site.bounds`.
    mlp: Mapping[int, Tensor] = field(default_factory=dict)
    # Of the prompt's tokens as keys, from that layer on. Gates of several stages multiply.
    tokens: Mapping[int, TokenGates] = field(default_factory=dict)

    @staticmethod
    def of(
        plans: Sequence[Plan], graph: Graph, tokens: Mapping[int, TokenGates] | None = None
    ) -> Gates:
        """Hard gates that say what plans say, one plan per sample.

        Gates of the token stages are given, since a plan does not determine them by itself.
        """
        for plan in plans:
            check_plan(plan, graph)

        def hard(kind: str) -> dict[int, Tensor]:
            gates = {}
            for site in graph.sites_of(kind):
                # Where a layer is off, its own gate says so.
                kept = {
                    row: plan.kept(site)
                    for row, plan in enumerate(plans)
                    if site.layer not in plan.layers_off and not plan.kept(site).everything
                }
                if not kept:
                    continue
                divisions = {one.of for one in kept.values()}
                of = divisions.pop() if len(divisions) == 1 else site.lanes
                gate = torch.ones(len(plans), of)
                for row, one in kept.items():
                    gate[row] = 0
                    gate[row, list(one.switches if one.of == of else numbers_of(one.lanes))] = 1
                gates[site.layer] = gate
            return gates

        off = {layer for plan in plans for layer in plan.layers_off}
        return Gates(
            {n: torch.tensor([float(n not in plan.layers_off) for plan in plans]) for n in off},
            hard("heads"),
            hard("mlp"),
            tokens or {},
        )


class MaskedExecutor:
    """Runs one stock transformers model under gates."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model = model
        self.graph = graph
        self.layers = bind(model, graph)
        self._attention: dict[int, list[Any]] = {}

    @cached_property
    def _branches(self) -> dict[int, list[nn.Module]]:
        """By layer, the modules whose outputs it adds up; none where it does not only add."""
        known = {operator.module for operator in self.graph}
        branches: dict[int, list[nn.Module]] = {}
        for layer in self.layers:
            site = self.graph.sites_by_name.get(f"layer.{layer.index}")
            inner = layer.module.named_modules()
            # Attention to an encoder adds to the stream, too, and is in no Graph.
            if site is None or any(
                module._parameters and f"{site.module}.{path}" not in known
                for path, module in inner
            ):
                continue
            found = residual_branches(self.graph, site)
            branches[layer.index] = [self.model.get_submodule(name) for name in found]
        return branches

    def _attention_of(self, layer: BoundLayer) -> list[Any]:
        """The attention blocks of a layer, by which alone its tokens see one another.

        InputError where they do so otherwise, too, or attention cannot be gated.
        """
        if layer.index not in self._attention:
            inner = [o for o in self.graph if o.part == "decoder" and o.layer == layer.index]
            kinds = {operator.kind for operator in inner}
            paths = dict.fromkeys(o.module for o in inner if o.kind == "attention")
            blocks: list[Any] = [self.model.get_submodule(path) for path in paths]
            if layer.heads is not None:
                blocks = [layer.heads.module]
            others = kinds & {"scan", "conv"} or (not blocks and kinds & {"matmul"})
            if others or not all(hasattr(block, "config") for block in blocks):
                raise InputError(
                    f"tokens cannot be masked in layer {layer.index}: its "
                    f"{type(layer.module).__name__} mixes them in a way of its own"
                )
            self._attention[layer.index] = blocks
        return self._attention[layer.index]

    @contextmanager
    def using(self, gates: Gates, state: TokenState | None = None) -> Iterator[None]:
        """Apply gates for a block.

        A batch of more rows than gates repeats each sample's gates (beams). `state` is of the
        tokens that a cache holds, where the prompt was read in an earlier block.
        """
        state = state or TokenState()
        with Patches() as patches, ExitStack() as hooks:
            for layer in self.layers:
                number, module = layer.index, layer.module
                for site, switches in (
                    (layer.heads, gates.heads.get(number)),
                    (layer.mlp, gates.mlp.get(number)),
                ):
                    if switches is not None:
                        if site is None:
                            raise InputError(f"layer {number} has no such site to mask")
                        hook = partial(_mask_features, switches, _switch_of(site, switches))
                        hooks.enter_context(site.sink.host.register_forward_pre_hook(hook))
                if gates.tokens:
                    enter = partial(state.enter, number, gates.tokens.get(number))
                    hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                if gates.tokens and number >= min(gates.tokens):
                    for block in self._attention_of(layer):
                        config = getattr(block.config, "original_config", block.config)
                        of_keys = partial(state.of, number)
                        view = ConfigView(config, _attn_implementation=MASKED, gates=of_keys)
                        patches.set(block, "config", view)
                        check = partial(state.check_asked, number)
                        hooks.enter_context(block.register_forward_hook(check))
                if number in gates.layers:
                    gate = gates.layers[number]
                    branches = self._branches.get(number, [])
                    for branch in branches:
                        hook = partial(_mask_output, gate)
                        hooks.enter_context(branch.register_forward_hook(hook))
                    if not branches:
                        hook = partial(_mask_layer, gate)
                        hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
            yield


def _switch_of(site: BoundSite, gates: Tensor) -> Tensor:
    """For each input feature of the site's last linear its switch, -1 where it has none."""
    sink = site.sink
    divided = replace(site.site, switches=gates.shape[-1])
    switch = torch.full((sink.features,), -1, device=sink.parameter.device)
    for number in range(divided.switches):
        start, stop = divided.bounds[number : number + 2]
        for first, last in sink.runs(((start, stop),) if stop > start else ()):
            switch[first:last] = number
    for first, last in sink.shared:
        switch[first:last] = -1
    return switch


def _rows(gates: Tensor, like: Tensor) -> Tensor:
    """One row of gates per batch row."""
    copies, rest = divmod(like.shape[0], gates.shape[0])
    if rest:
        raise InputError(f"there are gates for {gates.shape[0]} samples and {like.shape[0]} rows")
    return gates.to(like).repeat_interleave(copies, 0)


def _mask_features(
    gates: Tensor, switch: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]
) -> Tensor:
    features = inputs[0]
    rows = _rows(gates, features)
    mask = torch.where(switch < 0, 1, rows[:, switch.clamp(min=0)])
    # Some layers compute on the tokens of all samples in one row after another.
    return features * (mask if features.ndim == 2 else mask[:, None, :])


def _mask_output(gates: Tensor, _: nn.Module, args: Any, output: Tensor) -> Tensor:
    rows = _rows(gates, output)
    return output * (rows[:, None] if output.ndim == 2 else rows[:, None, None])


def _mask_layer(
    gates: Tensor, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    inner = hidden_of(output)
    gated = hidden + _rows(gates, hidden)[:, None, None] * (inner - hidden)
    return with_hidden(output, gated, whole=True)


class TokenState:
    """Gates of all tokens seen, by the layer from which they hold."""

    def __init__(self) -> None:
        self.gates: dict[int, Tensor] = {}
        self.fresh = True
        self._asked: set[int] = set()

    def enter(
        self, layer: int, stage: TokenGates | None, _: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Before a layer: gates of the prompt at its stage, of later tokens 1."""
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = cache_among(kwargs)
        if layer == 0:
            self.fresh = cache is None or not cache.get_seq_length()
        if stage is None:
            return
        if self.fresh:
            gates = stage(hidden) if callable(stage) else stage
            self.gates[layer] = _rows(gates, hidden)
        else:
            new = hidden.new_ones(hidden.shape[:2])
            self.gates[layer] = torch.cat([self.gates[layer], new], 1)

    def of(self, layer: int) -> Tensor:
        """Gates of keys in a layer, shape (batch, tokens seen)."""
        self._asked.add(layer)
        return reduce(mul, (gates for stage, gates in self.gates.items() if stage <= layer))

    def check_asked(self, layer: int, block: nn.Module, *_: Any) -> None:
        """Behind an attention block: raise InputError unless it went by its keys' gates."""
        if layer not in self._asked:
            raise InputError(
                f"tokens cannot be masked in layer {layer}: {type(block).__name__} computes its "
                "attention itself, past transformers' attention functions"
            )
        self._asked.discard(layer)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with gated keys: softmax weights exp(s) g / sum exp(s) g, a token's own gate 1.

    Dynamic-LLaVA (arXiv 2412.00876), masked softmax. With gates of 0 and 1 it is attention without
    the tokens that are off, and gradients reach gates that are 0, which adding log g would not do.

    Args:
        module: the attention block; its config view holds the gates.
        query: shape (batch, heads, queries, head_dim).
        key: shape (batch, kv heads, keys, head_dim), and `value` alike.
        attention_mask: None, or shape (batch or 1, 1, queries, keys), bool or additive.
        scaling: factor on the scores; None is 1/sqrt(head_dim).
        softcap: bound on the scores.
        s_aux: shape (heads,): scores of sinks, to which a part of the weights goes.
        position_bias: shape (batch or 1, heads, queries, keys), added to the scores.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys = query.shape[-2], key.shape[-2]
    own = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    mask = attention_mask
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = own if queries > 1 and causal else own | True
    if mask.dtype == torch.bool:
        # Finite, since rows of padding may have no key at all.
        least = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, least)
    if position_bias is not None:
        mask = mask + position_bias
    view: Any = module.config
    gates = view.gates()[:, -keys:].to(query.dtype)
    diagonal = own ^ own.tril(keys - queries - 1)
    gates = torch.where(diagonal, 1, gates[:, None, None, :])
    dropout = dropout if module.training else 0.0
    if not (gates.requires_grad or output_attentions or softcap or s_aux is not None):
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, mask + gates.log(), dropout, scale=scaling
        )
        return attended.transpose(1, 2).contiguous(), None
    scores = query * scaling @ key.mT
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores, gates = (scores + mask).float(), gates.float()
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
        gates = torch.cat([gates, torch.ones_like(gates[..., :1])], -1)
    weights: Tensor = cast(Any, _GatedSoftmax).apply(scores, gates)[..., :keys]
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class _GatedSoftmax(torch.autograd.Function):
    """exp(s) g / sum exp(s) g, of scores (batch, heads, q, k) and gates (batch, 1, q, k).

    By hand, since it takes most of a training step, and autograd goes over it twice as often.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, gates: Tensor) -> Tensor:
        open_weights = scores.softmax(-1)
        weights = open_weights * gates
        total = weights.sum(-1, keepdim=True)
        weights, open_weights = weights.div_(total), open_weights.div_(total)
        ctx.save_for_backward(open_weights, weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        open_weights, weights = ctx.saved_tensors
        (gradient,) = gradients
        excess = gradient - (gradient * weights).sum(-1, keepdim=True)
        return weights * excess, (open_weights * excess).sum(1, keepdim=True)


ALL_ATTENTION_FUNCTIONS.register(MASKED, _attend)
