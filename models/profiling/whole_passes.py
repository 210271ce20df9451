"""Whole passes of small models under random plans: what they take beside what is predicted.

What operators take alone leaves out the host's work between them, and what their neighbours leave
in caches. Both are fitted on some passes, and the error of predictions is taken on others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import lsq_linear
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from planner.ir.cost import Workload, price
from planner.ir.cost.measured_device import PRECISIONS, SORTS, MeasuredDevice, sort_of
from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.models.profiling.operator_cases import Bench, Case
from planner.models.profiling.stopwatch import stopwatch_for
from planner.models.running.kv_cache import cache_argument
from planner.models.running.session import Session
from planner.models.running.skipping import session_on
from planner.plan import Plan, TokenStage
from planner.planning.compiler import specialised
from planner.planning.switches import with_switches
from planner.progress import Progress

IMAGE = 1000  # token of images in random models
# A decoded token is timed over so many of them.
_STEPS = 4
# Rows, in and out features of a product that tells how fast the machine is just now.
_REFERENCE = (256, 1024, 1024)
# What operators take in a model over what they take alone is in between.
_FACTORS = (0.6, 1.7)


@dataclass(frozen=True)
class Pass:
    """One pass of a model under a plan: its prompt, or a token decoded after that."""

    plan: Plan
    load: Workload
    decodes: bool

    def costs(self, graph: Graph, device: MeasuredDevice) -> Iterator[tuple[str, float]]:
        """(sort, seconds) of every operator that runs."""
        kept = {stage.layer: stage.keep for stage in self.plan.tokens}
        load = self.load
        sizes = load.decode(_STEPS // 2, kept) if self.decodes else load.prefill(kept)
        narrow = specialised(graph, self.plan)
        for operator in narrow:
            seconds = price(operator, narrow, sizes, device).seconds
            if seconds:
                yield sort_of(operator), seconds

    def predicted(self, graph: Graph, device: MeasuredDevice) -> float:
        """Seconds."""
        seconds = sum(seconds for _, seconds in self.costs(graph, device))
        return seconds + device.pass_seconds(graph.dtype_bytes)


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
    """A model with random weights, of which passes are timed."""

    bench: Bench
    model: Any
    graph: Graph
    session: Session

    @staticmethod
    def of(bench: Bench, width: int, layers: int, sees: bool = False) -> Subject:
        """See `random_model`."""
        model = random_model(width, layers, 168 if sees else 0)
        model = model.to(bench.place, bench.dtype)
        graph = with_switches(lower_model(model, f"random-{width}"))
        return Subject(bench, model, graph, session_on(model, graph, freeze=True))

    def draw(self, rng: random.Random, most_tokens: int, decodes: bool) -> Pass:
        """A random plan on a prompt of random length."""
        images = int(self.graph.properties.get("image_tokens", 0))
        load = Workload.default(self.graph, text_tokens=rng.randint(4, most_tokens))
        layers = self.graph.layers
        off = tuple(n for n in range(1, layers) if rng.random() < 0.2)
        stages: tuple[TokenStage, ...] = ()
        if images and rng.random() < 0.7:
            stages = (TokenStage(1, rng.randint(1, images), images),)
        kept = [
            (site, tuple(sorted(rng.sample(range(site.switches), rng.randint(1, site.switches)))))
            for site in self.graph.sites
            if site.kind in ("heads", "mlp")
        ]
        plan = Plan.of(self.graph, layers_off=off, tokens=stages).keeping(kept)
        return Pass(plan, load, decodes)

    @torch.no_grad()
    def seconds(self, one: Pass, rounds: int = 3) -> float:
        """Median of a pass under its plan."""
        self.session.obey(one.plan)
        run = self._decoding(one) if one.decodes else lambda: self.prompt(one)
        watch, steps = stopwatch_for(self.bench.place), _STEPS if one.decodes else 1
        for _ in range(2):  # the second copies what frozen plans keep
            run()()
        return median(watch.seconds([run()]) for _ in range(rounds)) / steps

    def _inputs(self, one: Pass) -> dict[str, torch.Tensor]:
        load, place = one.load, self.bench.place
        ids = torch.randint(3, 800, (1, load.prompt_tokens), device=place)
        if not load.image_tokens:
            return {"input_ids": ids}
        ids[:, 1 : 1 + load.image_tokens] = IMAGE
        size = self.model.config.vision_config.image_size
        return {"input_ids": ids, "pixel_values": self.bench.random(1, 3, size, size)}

    def prompt(self, one: Pass) -> Callable[[], Any]:
        """What computes a random prompt, under the plan that holds."""
        inputs = self._inputs(one)
        return lambda: self.model(**inputs, logits_to_keep=1)

    def _decoding(self, one: Pass) -> Callable[[], Callable[[], Any]]:
        inputs, word = self._inputs(one), torch.tensor([[5]], device=self.bench.place)

        def prepared() -> Callable[[], Any]:
            cached = {cache_argument(self.model.forward): DynamicCache()}
            self.model(**inputs, logits_to_keep=1, **cached)

            def steps() -> None:
                for _ in range(_STEPS):
                    self.model(input_ids=word, **cached)

            return steps

        return prepared


@dataclass(frozen=True)
class Timed:
    """A pass and what it took; `reference`: what one product took before and after it."""

    subject: Subject
    one: Pass
    seconds: float
    reference: float = 0.0

    def error(self, device: MeasuredDevice) -> float:
        """Of the prediction, relative."""
        return self.one.predicted(self.subject.graph, device) / self.seconds - 1

    def error_at_pace(self, device: MeasuredDevice) -> float:
        """The same, were the machine as fast as when it was measured."""
        tables = device.at(self.subject.graph.dtype_bytes).tables
        pace = self.reference / tables["product"].at(*_REFERENCE)
        return (1 + self.error(device)) * pace - 1


def timed(
    subjects: Sequence[Subject], count: int, most_tokens: int, seed: int, progress: Progress
) -> list[Timed]:
    """Random passes, a quarter of them decoding."""
    rng, found, bench = random.Random(seed), [], subjects[0].bench
    watch = stopwatch_for(bench.place)
    product = bench.runs(Case("product", _REFERENCE, next(iter(bench.backends))), 1)
    for number in range(count):
        subject = subjects[number % len(subjects)]
        one = subject.draw(rng, most_tokens, decodes=rng.random() < 0.25)
        before = [watch.seconds(product) for _ in range(3)]
        seconds = subject.seconds(one)
        after = [watch.seconds(product) for _ in range(3)]
        found.append(Timed(subject, one, seconds, median(before + after)))
        progress(number + 1, count)
    return found


def fitted(device: MeasuredDevice, passes: Sequence[Timed]) -> MeasuredDevice:
    """A device with what passes take besides their operators, by least squares of relative errors.

    All passes are of models of one precision.
    """
    precision = PRECISIONS[passes[0].subject.graph.dtype_bytes]
    rows = []
    for found in passes:
        costs = list(found.one.costs(found.subject.graph, device.alone()))
        sums = [sum(seconds for sort, seconds in costs if sort == wanted) for wanted in SORTS]
        rows.append(np.array([1.0, len(costs), *sums]) / found.seconds)
    low, high = _FACTORS
    bounds = [0.0, 0.0, *(low for _ in SORTS)], [np.inf, np.inf, *(high for _ in SORTS)]
    each_pass, each, *factors = lsq_linear(np.stack(rows), np.ones(len(rows)), bounds).x.tolist()
    known = replace(
        device.measured[precision],
        pass_seconds=each_pass,
        operator_seconds=each,
        factors=dict(zip(SORTS, factors, strict=True)),
    )
    return replace(device, measured={**device.measured, precision: known})
