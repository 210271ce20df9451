"""Models whose passes are timed, under random plans on random prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from planner.ir.cost import Workload, price
from planner.ir.cost.measured_device import MeasuredDevice
from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.loading import count_image_tokens
from planner.models.profiling.operator_cases import Bench
from planner.models.running.kv_cache import cache_argument
from planner.models.running.session import Session
from planner.models.running.skipping import session_on
from planner.plan import Plan, TokenStage
from planner.planning.compiler import specialised
from planner.planning.switches import with_switches

IMAGE = 1000  # token of images in random models
# A decoded token is timed over so many of them.
STEPS = 4


@dataclass(frozen=True)
class Pass:
    """One pass of a model under a plan: its prompt, or a token decoded after that."""

    plan: Plan
    load: Workload
    decodes: bool

    def predicted(self, graph: Graph, device: MeasuredDevice) -> float:
        """Seconds of a model with this graph."""
        return self.by(graph, [device])[0]

    def by(self, graph: Graph, devices: Sequence[MeasuredDevice]) -> list[float]:
        """The same, by several devices."""
        kept = {stage.layer: stage.keep for stage in self.plan.tokens}
        load = self.load
        sizes = load.decode(STEPS // 2, kept) if self.decodes else load.prefill(kept)
        narrow = specialised(graph, self.plan)
        return [
            sum(price(operator, narrow, sizes, here).seconds for operator in narrow)
            + here.pass_seconds(graph.dtype_bytes, sizes)
            for here in (device.on(graph) for device in devices)
        ]


def random_model(width: int, layers: int, image_size: int = 0) -> Any:
    """A LLaMA-shaped decoder of random weights in evaluation mode, or a LLaVA with one.

    `width`: of the decoder, a multiple of 64. `image_size`: pixels along a side, in patches of 14;
    0 for the decoder alone.
    """
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        intermediate_size=width * 43 // 16,
    )
    if not image_size:
        return LlamaForCausalLM(text).eval()
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


@dataclass(frozen=True)
class Subject:
    """A model of which passes are timed.

    `inputs`: its shortest prompt, of one sample, with a picture where it sees.
    """

    bench: Bench
    model: Any
    graph: Graph
    session: Session
    inputs: Mapping[str, torch.Tensor]

    @staticmethod
    def of(bench: Bench, model: Any, graph: Graph, inputs: Mapping[str, torch.Tensor]) -> Subject:
        """A loaded model, which is given a session."""
        graph = with_switches(graph)
        return Subject(bench, model, graph, session_on(model, graph, freeze=True), inputs)

    @staticmethod
    def made(bench: Bench, width: int, layers: int, sees: bool = False) -> Subject:
        """A model of random weights, see `random_model`."""
        image_size = 168 if sees else 0
        model = random_model(width, layers, image_size).to(bench.place, bench.dtype)
        images = (image_size // 14) ** 2
        ids = torch.tensor([[3, *[IMAGE] * images, 4, 5, 6]], device=bench.place)
        inputs = {"input_ids": ids}
        if sees:
            inputs["pixel_values"] = bench.random(1, 3, image_size, image_size)
        return Subject.of(bench, model, lower_model(model, f"random-{width}"), inputs)

    @cached_property
    def image_tokens(self) -> int:
        """Of its prompts."""
        return count_image_tokens(self.model, dict(self.inputs))

    @cached_property
    def least_text(self) -> int:
        """Tokens of its shortest prompt besides those of a picture."""
        return self.inputs["input_ids"].shape[1] - self.image_tokens

    def load(self, text_tokens: int) -> Workload:
        """A prompt of so many tokens besides those of the picture."""
        return Workload.default(self.graph, self.image_tokens, max(text_tokens, self.least_text))

    def draw(self, rng: random.Random, most_tokens: int, decodes: bool) -> Pass:
        """A random plan on a prompt of random length."""
        images, least = self.image_tokens, self.least_text
        load = self.load(rng.randint(least, max(least, most_tokens)))
        layers = self.graph.layers
        off = tuple(n for n in range(1, layers) if rng.random() < 0.2)
        stages: tuple[TokenStage, ...] = ()
        if images and layers > 1 and rng.random() < 0.7:
            stages = (TokenStage(1, rng.randint(1, images), images),)
        kept = [
            (site, tuple(sorted(rng.sample(range(site.switches), rng.randint(1, site.switches)))))
            for site in self.graph.sites
            if site.kind in ("heads", "mlp")
        ]
        plan = Plan.of(self.graph, layers_off=off, tokens=stages).keeping(kept)
        return Pass(plan, load, decodes)

    def prompt(self, one: Pass) -> Callable[[], Any]:
        """What computes a prompt of a pass's length, under the plan that holds."""
        inputs = self._inputs(one)
        return lambda: self.model(**inputs, logits_to_keep=1)

    def tokens(self, one: Pass) -> Callable[[], Any]:
        """What decodes `STEPS` tokens behind such a prompt, which this computes."""
        inputs, word = self._inputs(one), self.inputs["input_ids"][:, -1:]
        cached = {cache_argument(self.model.forward): DynamicCache()}
        self.model(**inputs, logits_to_keep=1, **cached)

        def steps() -> None:
            for _ in range(STEPS):
                self.model(input_ids=word, **cached)

        return steps

    def _inputs(self, one: Pass) -> dict[str, torch.Tensor]:
        """The shortest prompt, its last word repeated."""
        ids = self.inputs["input_ids"]
        more = one.load.text_tokens - self.least_text
        return {
            name: torch.cat([value, value[:, -1:].expand(-1, more)], 1)
            if value.shape == ids.shape
            else value
            for name, value in self.inputs.items()
        }
