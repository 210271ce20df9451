"""The two sides of ``gpu.py``: stock transformers layers, and planner's ops on the same weights."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from planner.kernels import block_ops as ops
from planner.kernels import naive
from planner.kernels.records import AttentionWeights, KVCache, MLPWeights, Norm, Survivors
from planner.models.running.kv_cache import cache_argument

__all__ = ["LLAVA_7B", "TINY", "Dense", "Draw", "Planned", "Size", "compare", "stock_decoder"]

# FastV selects before the third layer.
STAGE = 2
# Relative error in bfloat16: of a block, against float64; of two decoders' logits.
TOLERANCE, LOGITS = 1e-2, 5e-2


@dataclass(frozen=True)
class Size:
    """A LLaMA decoder and its prompt; `groups` switches per MLP."""

    layers: int
    hidden: int
    heads: int
    neurons: int
    groups: int
    vocabulary: int
    image_tokens: int
    text_tokens: int

    @property
    def head_dim(self) -> int:
        """Lanes per head."""
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return self.image_tokens + self.text_tokens


LLAVA_7B = Size(32, 4096, 32, 11008, 43, 32064, 576, 64)
TINY = Size(4, 64, 4, 128, 8, 128, 24, 9)


@dataclass(frozen=True)
class Draw:
    """A random plan: `kind` says what it leaves out, `budget` how much of the FLOPs stays.

    Kinds: ``nothing``, ``layers``, ``heads and mlp``, ``tokens``, ``all``.
    """

    kind: str
    budget: float

    @property
    def share(self) -> float:
        """What one way of saving keeps; three of them multiply to the budget."""
        return self.budget ** (1 / 3) if self.kind == "all" else self.budget

    def layers_on(self, size: Size) -> list[int]:
        """Layers that run; those in front of the token stage always do."""
        if self.kind not in ("layers", "all"):
            return [*range(size.layers)]
        free = [*range(STAGE, size.layers)]
        off = min(len(free), size.layers - round(size.layers * self.share))
        return sorted(set(range(size.layers)) - set(random.Random(0).sample(free, off)))

    def some(self, of: int, seed: int) -> list[int]:
        """Surviving heads or MLP groups of one layer."""
        if self.kind not in ("heads and mlp", "all"):
            return [*range(of)]
        return sorted(random.Random(seed).sample(range(of), max(1, round(of * self.share))))

    def neurons(self, size: Size, seed: int) -> tuple[tuple[int, int], ...]:
        """Surviving neurons of one layer as intervals, a group each, joined where they touch."""
        width, runs = size.neurons // size.groups, list[tuple[int, int]]()
        for group in self.some(size.groups, seed):
            start = group * width
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, (group + 1) * width))
        return tuple(runs)

    def image_tokens(self, size: Size) -> int:
        """Image tokens behind the stage."""
        if self.kind not in ("tokens", "all"):
            return size.image_tokens
        left = (self.share * size.layers - STAGE) / (size.layers - STAGE) * size.tokens
        return max(1, round(left) - size.text_tokens)


def stock_decoder(size: Size, device: torch.device) -> Any:
    """A random LlamaForCausalLM in bfloat16."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.neurons,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:
        # Every layer has a cache of its own here, and one compilation serves all.
        layer.self_attn.layer_idx = 0
    return model


def prompt(model: Any, size: Size, batch: int) -> tuple[Tensor, Tensor]:
    """(hidden states of a prompt, positions)."""
    device = model.lm_head.weight.device
    shape = (batch, size.tokens, size.hidden)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)
    positions = torch.arange(size.tokens, dtype=torch.int32, device=device)
    return hidden, positions.expand(batch, -1).contiguous()


class _Slots:
    """A KV cache of fixed size for one layer; the tokens of a call go behind the first `held`."""

    def __init__(self, like: Tensor, size: Size) -> None:
        shape = (2, len(like), size.heads, size.tokens + 1, size.head_dim)
        self.store, self.held = like.new_zeros(shape), 0

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        stop = self.held + key.shape[2]
        self.store[0, :, :, self.held : stop] = key
        self.store[1, :, :, self.held : stop] = value
        return self.store[0, :, :, :stop], self.store[1, :, :, :stop]


class Dense:
    """The stock layers, called as LlamaModel calls them."""

    def __init__(self, model: Any, size: Size, batch: int) -> None:
        self.model, self.size = model, size
        self.hidden, self.positions = prompt(model, size, batch)
        self.caches = [_Slots(self.hidden, size) for _ in range(size.layers)]
        self.layers = [*model.model.layers]
        self.cache_argument = cache_argument(self.layers[0].forward)

    def compile(self, wanted: bool) -> None:
        """Run layers under torch.compile from now on, or eagerly."""
        torch.compiler.reset()
        layers = self.model.model.layers
        self.layers = [torch.compile(layer, dynamic=False) for layer in layers] if wanted else [
            *layers
        ]  # fmt: skip

    def prefill(self) -> Tensor:
        """Logits of the last token, (batch, 1, vocabulary)."""
        return self._run(self.hidden, self.positions, 0)

    def decode(self) -> Tensor:
        """Logits of one token more."""
        return self._run(self.hidden[:, :1], self.positions[:, -1:] + 1, self.size.tokens)

    def _run(self, hidden: Tensor, positions: Tensor, held: int) -> Tensor:
        angles = self.model.model.rotary_emb(hidden, position_ids=positions)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            cache.held = held
            cached = {self.cache_argument: cache}
            hidden = layer(hidden, position_embeddings=angles, **cached)
        return self.model.lm_head(self.model.model.norm(hidden[:, -1:]))


@dataclass(frozen=True)
class _Layer:
    """What survives of one layer, and the cache of its heads."""

    attention: AttentionWeights
    mlp: MLPWeights
    heads: Survivors
    neurons: Survivors
    cache: KVCache
    tokens: int


class Planned:
    """The same decoder by planner's ops, under one plan for all samples."""

    def __init__(self, model: Any, size: Size, batch: int, draw: Draw) -> None:
        self.model, self.size, self.batch, self.draw = model, size, batch, draw
        self.hidden, self.positions = prompt(model, size, batch)
        device = self.hidden.device
        self.keep = draw.image_tokens(size)
        self.length = size.text_tokens + self.keep
        self.candidates = torch.zeros(batch, size.tokens, dtype=torch.bool, device=device)
        self.candidates[:, 1 : 1 + size.image_tokens] = True
        self.kept = torch.full((batch,), self.keep, dtype=torch.int32, device=device)
        self.layers = {index: self._layer(index) for index in draw.layers_on(size)}

    def _layer(self, index: int) -> _Layer:
        size, stock = self.size, self.model.model.layers[index]
        device = self.hidden.device
        attention, mlp = stock.self_attn, stock.mlp
        norms = [
            Norm(norm.weight, eps=norm.variance_epsilon)
            for norm in (stock.input_layernorm, stock.post_attention_layernorm)
        ]
        heads = self.draw.some(size.heads, index)
        lanes = [n for a, b in self.draw.neurons(size, index) for n in range(a, b)]
        tokens = size.tokens if index < STAGE else self.length
        cache = KVCache.regular(self.batch, len(heads), tokens + 1, size.head_dim, self.hidden)
        return _Layer(
            AttentionWeights(
                attention.q_proj.weight,
                attention.k_proj.weight,
                attention.v_proj.weight,
                attention.o_proj.weight,
                size.head_dim,
                norm=norms[0],
            ),
            MLPWeights(
                mlp.up_proj.weight, mlp.down_proj.weight, mlp.gate_proj.weight, norm=norms[1]
            ),
            Survivors.of([heads], size.heads, slots=len(heads), device=device),
            Survivors.of([lanes], size.neurons, 8, slots=len(lanes) // 8, device=device),
            cache,
            tokens,
        )

    def prefill(self) -> Tensor:
        """Logits of the last token, (batch, 1, vocabulary)."""
        hidden, positions = self.hidden, self.positions
        angles = self._angles(hidden, positions)
        for index, layer in self.layers.items():
            before = hidden[:, -1:]
            hidden = self._run(layer, hidden, positions, positions, angles, held=False)
            if index == STAGE - 1 and self.keep < self.size.image_tokens:
                hidden, positions = self._select(layer, before, hidden, positions)
                angles = self._angles(hidden, positions)
        return self._logits(hidden)

    def decode(self) -> Tensor:
        """Logits of one token more; caches are left as they are."""
        hidden, positions = self.hidden[:, :1].contiguous(), self.positions[:, -1:] + 1
        angles = self._angles(hidden, positions)
        for layer in self.layers.values():
            # Which places the kept tokens have does not change the work.
            every = self.positions.new_zeros(self.batch, layer.tokens + 1)
            hidden = self._run(layer, hidden, positions, every, angles, held=True)
        return self._logits(hidden)

    def _run(
        self,
        layer: _Layer,
        hidden: Tensor,
        positions: Tensor,
        key_positions: Tensor,
        angles: tuple[Tensor, Tensor],
        held: bool,
    ) -> Tensor:
        lengths = torch.full_like(layer.cache.lengths, layer.tokens if held else 0)
        cache = replace(layer.cache, lengths=lengths)
        hidden = ops.attention_cached(
            hidden,
            layer.attention,
            layer.heads,
            angles,
            positions,
            cache,
            key_positions,
            hidden,
        )
        return ops.mlp(hidden, layer.mlp, layer.neurons, hidden)

    def _select(
        self, layer: _Layer, before: Tensor, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """FastV: the last token's queries score the keys of the layer that has just run."""
        weights, head_dim = layer.attention, self.size.head_dim
        assert weights.norm is not None
        normed = naive.normalize(before, weights.norm)
        queries = F.linear(normed, weights.query).unflatten(-1, (-1, head_dim))
        queries = naive.rotate(queries, *self._angles(before, positions[:, -1:]))
        queries = queries[:, 0, layer.heads.units[0].long()].contiguous()
        chosen, index = ops.select_tokens(
            hidden,
            queries,
            layer.cache,
            layer.heads,
            positions,
            self.candidates,
            self.kept,
            self.length,
            scale=head_dim**-0.5,
        )
        return chosen, positions.gather(1, index.long()).contiguous()

    def _angles(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.model.model.rotary_emb(hidden, position_ids=positions)
        return cos, sin

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden[:, -1:]))

    # -- what it should be --------------------------------------------------------------------

    @torch.no_grad()
    def check(self) -> None:
        """Compare blocks of the first and last layer that run, on one sample, with float64.

        Raises:
            ValueError: one is further off than its precision allows.
        """
        for index in sorted({min(self.layers), max(self.layers)}):
            layer = self.layers[index]
            hidden = torch.randn_like(self.hidden[:1, : layer.tokens])
            got = ops.mlp(hidden, layer.mlp, layer.neurons)
            want = naive.mlp(hidden.double(), _wide(layer.mlp), layer.neurons)
            compare(f"MLP of layer {index}", got, want)
            self._check_attention(index, layer)
        if self.keep < self.size.image_tokens and STAGE - 1 in self.layers:
            self._check_selection(self.layers[STAGE - 1])
        if not torch.isfinite(self.prefill()).all():
            raise ValueError("the logits of the prompt are not finite")

    @torch.no_grad()
    def check_logits(self, dense: Dense) -> None:
        """Compare logits with the dense decoder's, where a plan leaves nothing out.

        Raises:
            ValueError: they differ by more than rounding.
        """
        for phase in ("prefill", "decode"):
            got, want = getattr(self, phase)(), getattr(dense, phase)()
            compare(f"logits of {phase}", got, want.double(), LOGITS)

    def _check_attention(self, index: int, layer: _Layer) -> None:
        """A prompt, then one token more."""
        count, like = layer.tokens + 1, self.hidden[:1]
        hidden = torch.randn_like(like[:, :1].expand(-1, count, -1))
        positions = torch.arange(count, dtype=torch.int32, device=like.device)[None]
        cos, sin = self._angles(hidden, positions)
        wide = (cos.double(), sin.double())
        want = naive.attention(
            hidden.double(), _wide(layer.attention), layer.heads, wide, positions
        )
        cache = KVCache.regular(1, layer.heads.slots, count, self.size.head_dim, like)
        for start, stop in ((0, layer.tokens), (layer.tokens, count)):
            now = slice(start, stop)
            got = ops.attention_cached(
                hidden[:, now].contiguous(),
                layer.attention,
                layer.heads,
                (cos[:, now], sin[:, now]),
                positions[:, now].contiguous(),
                replace(cache, lengths=torch.full_like(cache.lengths, start)),
                positions,
            )
            compare(f"attention of layer {index}, {stop - start} tokens", got, want[:, now])

    def _check_selection(self, layer: _Layer) -> None:
        """The tokens that are kept have the highest attention there is, up to rounding."""
        batch, slots = self.batch, layer.heads.slots
        queries = torch.randn_like(self.hidden[:, 0]).unflatten(-1, (-1, self.size.head_dim))
        queries = queries[:, :slots].contiguous()
        layer.cache.keys.normal_()
        keys = layer.cache.keys.view(batch, slots, -1, self.size.head_dim)[:, :, : layer.tokens]
        scores = torch.einsum("bhd,bhtd->bht", queries.double(), keys.double())
        scale = self.size.head_dim**-0.5
        scores = (scores * scale).softmax(-1).sum(1).masked_fill(~self.candidates, 0)
        _, index = ops.select_tokens(
            self.hidden, queries, layer.cache, layer.heads, self.positions, self.candidates,
            self.kept, self.length, scale=scale,
        )  # fmt: skip
        chosen, best = scores.gather(1, index.long()).sum(), scores.topk(self.keep).values.sum()
        if not (index.diff() > 0).all() or chosen < (1 - 1e-3) * best:
            raise ValueError("the token stage does not keep the tokens of the highest attention")

    def ideal(self, phase: str) -> float:
        """FLOPs of a prompt, or bytes read for a token, over those of the dense decoder."""
        size = self.size
        kept = [
            (layer.heads.slots * size.head_dim, layer.neurons.slots * 8, layer.tokens)
            for layer in self.layers.values()
        ]
        whole = [(size.hidden, size.neurons, size.tokens)] * size.layers
        return self._work(kept, phase) / self._work(whole, phase)

    def _work(self, layers: list[tuple[int, int, int]], phase: str) -> float:
        hidden, head = self.size.hidden, self.size.hidden * self.size.vocabulary
        weights = [hidden * (4 * lanes + 3 * neurons) for lanes, neurons, _ in layers]
        if phase == "decode":
            cached = sum(2 * lanes * tokens for lanes, _, tokens in layers)
            return sum(weights) + head + self.batch * cached
        mixed = sum(4 * tokens**2 * lanes for lanes, _, tokens in layers)
        dense = (2 * w * tokens for w, (_, _, tokens) in zip(weights, layers, strict=True))
        return sum(dense) + mixed + 2 * head


def _wide(record: Any) -> Any:
    """A record in float64, its norm's too."""
    changes = {
        name: value.double() if isinstance(value, Tensor) else _wide(value)
        for name, value in vars(record).items()
        if isinstance(value, Tensor | Norm)
    }
    return replace(record, **changes)


def compare(what: str, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    """ValueError unless a result is as near its float64 reference as bfloat16 allows."""
    error = float((got.double() - want).norm() / want.norm())
    if not error <= tolerance:
        raise ValueError(f"{what}: {error:.1e} off the reference, more than {tolerance:g}")
