"""What ``gpu.py`` runs: a random LLaVA under random plans, by PyTorch or by planner's kernels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from planner.ir.graph import Graph
from planner.kernels.choice import Kernels
from planner.models.running.kv_cache import cache_argument
from planner.models.running.skipping import session_on
from planner.plan import Plan, TokenStage

# FastV selects before the third layer.
STAGE = 2
IMAGE = 3  # the placeholder's id
# Relative error in bfloat16: of an op, against float64; of logits, against PyTorch's.
TOLERANCE, LOGITS = 1e-2, 5e-2


@dataclass(frozen=True)
class Size:
    """A LLaMA decoder and its prompt; `groups` switches per MLP, `side`^2 image tokens."""

    layers: int
    hidden: int
    heads: int
    neurons: int
    groups: int
    vocabulary: int
    side: int
    text_tokens: int

    @property
    def head_dim(self) -> int:
        """Lanes per head."""
        return self.hidden // self.heads

    @property
    def image_tokens(self) -> int:
        """Of one image."""
        return self.side**2

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return self.image_tokens + self.text_tokens


LLAVA_7B = Size(32, 4096, 32, 11008, 43, 32064, 24, 64)
# Few tokens: what interprets kernels takes longer by the tile.
TINY = Size(4, 64, 4, 128, 8, 128, 3, 5)


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

    def neurons(self, size: Size, seed: int) -> list[int]:
        """Surviving neurons of one layer, a group each."""
        width = size.neurons // size.groups
        groups = self.some(size.groups, seed)
        return [neuron for g in groups for neuron in range(g * width, (g + 1) * width)]

    def image_tokens(self, size: Size) -> int:
        """Image tokens behind the stage."""
        if self.kind not in ("tokens", "all"):
            return size.image_tokens
        left = (self.share * size.layers - STAGE) / (size.layers - STAGE) * size.tokens
        return max(1, round(left) - size.text_tokens)

    def plan(self, graph: Graph, size: Size) -> Plan:
        """The plan, which nobody has solved."""
        on = self.layers_on(size)
        narrows = self.kind in ("heads and mlp", "all")
        keep = self.image_tokens(size)
        stages = (TokenStage(STAGE, keep, size.image_tokens, "fastv"),)
        return Plan(
            graph.name,
            str(graph.properties["fingerprint"]),
            size.layers,
            layers_off=tuple(sorted(set(range(size.layers)) - set(on))),
            heads={i: tuple(self.some(size.heads, i)) for i in on if narrows},
            mlp={i: tuple(self.some(size.groups, i)) for i in on if narrows},
            mlp_switches={i: size.groups for i in on if narrows},
            tokens=stages if keep < size.image_tokens else (),
        )

    def ideal(self, size: Size, batch: int, phase: str) -> float:
        """FLOPs of a prompt, or bytes read for a token, over those of the dense decoder."""
        kept, whole = (draw._work(size, batch, phase) for draw in (self, Draw("nothing", 1.0)))
        return kept / whole

    def _work(self, size: Size, batch: int, phase: str) -> float:
        head, total = size.hidden * size.vocabulary, 0.0
        for index in self.layers_on(size):
            tokens = size.text_tokens + self.image_tokens(size) if index >= STAGE else size.tokens
            lanes = len(self.some(size.heads, index)) * size.head_dim
            weights = size.hidden * (4 * lanes + 3 * len(self.neurons(size, index)))
            if phase == "decode":
                total += weights + batch * 2 * lanes * tokens
            else:
                total += 2 * weights * tokens + 4 * tokens**2 * lanes
        return total + (head if phase == "decode" else 2 * head)


def build(size: Size, device: torch.device) -> Any:
    """A random LLaVA in bfloat16, its vision tower a small one."""
    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.neurons,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=14 * size.side,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


class Decoder:
    """A model with its prompts, dense or under a plan."""

    def __init__(self, model: Any, graph: Graph, size: Size, batch: int) -> None:
        self.model, self.graph, self.size, self.batch = model, graph, size, batch
        self.called = model
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(IMAGE + 1, size.vocabulary, (batch, size.tokens), generator=generator)
        ids[:, 1 : 1 + size.image_tokens] = IMAGE
        side = 14 * size.side
        pixels = torch.randn(batch, 3, side, side, generator=generator)
        self.inputs = {"input_ids": ids.to(device), "pixel_values": pixels.to(device).bfloat16()}
        self.word = self.inputs["input_ids"][:, -1:]
        self._cached: dict[str, Any] = {}

    def compile(self) -> None:
        """Run under torch.compile from now on."""
        torch.compiler.reset()
        self.called = torch.compile(self.model, dynamic=False)

    @contextmanager
    def under(self, draw: Draw, kernels: str) -> Iterator[None]:
        """Run under a plan, computed by planner's kernels or by PyTorch."""
        session = session_on(self.model, self.graph, kernels=Kernels.of(kernels))
        try:
            with session.under(draw.plan(self.graph, self.size)):
                yield
        finally:
            session.close()

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Logits of the last token, (batch, 1, vocabulary)."""
        logits: Tensor = self.called(**self.inputs, logits_to_keep=1).logits
        return logits

    @torch.no_grad()
    def read(self) -> None:
        """Read the prompts, for `decode` to go on from."""
        self._cached = {cache_argument(self.model.forward): DynamicCache()}
        self.called(**self.inputs, logits_to_keep=1, **self._cached)

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Logits of one token more."""
        logits: Tensor = self.called(input_ids=self.word, **self._cached).logits
        return logits

    def check(self, draw: Draw) -> None:
        """Compare logits by planner's kernels with those by PyTorch under a plan.

        Raises:
            ValueError: they differ by more than rounding.
        """
        found = []
        for kernels in ("torch", "triton"):
            with self.under(draw, kernels):
                prompt = self.prefill()
                self.read()
                found.append((prompt, self.decode()))
        for phase, want, got in zip(("prefill", "decode"), *found, strict=True):
            compare(f"logits of {phase}", got, want.double(), LOGITS)


def compare(what: str, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    """ValueError unless a result is as near its reference as bfloat16 allows."""
    error = float((got.double() - want).norm() / want.norm())
    if not error <= tolerance:
        raise ValueError(f"{what}: {error:.1e} off the reference, more than {tolerance:g}")
