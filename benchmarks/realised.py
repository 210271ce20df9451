"""Does a plan save the time that it saves in FLOPs? Realised over ideal, on this machine.

    python benchmarks/realised.py [--quick] [--json] [--threads N] [--clock wall|cpu]

A LLaMA-shaped decoder (8 layers, width 1024, 640 tokens, float32) and a LLaVA of that size run
under layer plans, head and MLP plans, token plans and mixed ones. Realised is measured time over
the base model's. Both sides run in this process one after the other, round by round, and the median
of the rounds' ratios counts: what slows the machine for a while slows both sides of a round. Ideal
is the same ratio of FLOPs, counted on what runs. Both sides run eagerly, or both under
torch.compile. When decoding, the gain in tokens per second is set against bytes: the weights, keys
and values that a token reads in the base model, over those under the plan. Nothing is reported
unless the narrowed models agree with the masked ones.

On a machine that is busy with other things, ``--clock cpu --threads 1`` counts this process's
seconds only.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from planner.cli.output import print_json, table
from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.models.cache import cache_argument, kv_bytes
from planner.models.executor import Executor
from planner.models.masked import Gates, MaskedExecutor
from planner.models.selectors import DecoderInputs, Uniform
from planner.plan import Plan, TokenStage

LAYERS, WIDTH, HEADS, NEURONS, TOKENS = 8, 1024, 16, 2752, 640
SWITCHES = 16
IMAGE_TOKENS, IMAGE = 576, 1000
BUDGETS = (0.5, 0.65, 0.85)
# The last two drop image tokens.
PLANS = ("layers", "heads and mlp", "tokens", "mixed")
# Realised over ideal, at most.
TARGETS = {"fixed plan": 1.05, "new plan per input": 1.08, "fixed plan, compiled": 1.05}
# Share of the gain that the bytes saved allow, at least.
DECODE, DECODE_TARGET = "decoding", 0.9
# The same of a stock model built with the sizes that a plan leaves: what no narrowing can beat.
BUILT_SMALLER = "decoding, built smaller"
# Planning and dispatch over a prefill of the base model, at most.
DISPATCH, DISPATCH_TARGET = "dispatch", 0.01
PARITY = 1e-5


class Invalid(Exception):
    """What is measured computes something else than it should."""


def build(kind: str) -> tuple[Any, dict[str, Tensor]]:
    """A random model and its prompt of `TOKENS` tokens."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=1024,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=NEURONS,
    )
    ids = torch.randint(3, 999, (1, TOKENS))
    if kind == "decoder":
        return LlamaForCausalLM(text).eval(), {"input_ids": ids}
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )
    ids[:, 32 : 32 + IMAGE_TOKENS] = IMAGE
    return model.eval(), {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}


def draw(graph: Graph, kind: str, budget: float, seed: int) -> Plan:
    """A random plan of about the given fraction of the decoder's FLOPs."""
    rng = random.Random(seed)
    off: tuple[int, ...] = ()
    heads: dict[int, tuple[int, ...]] = {}
    mlp: dict[int, tuple[int, ...]] = {}
    tokens: tuple[TokenStage, ...] = ()
    # Mixed: three savings that multiply to the budget.
    share = budget ** (1 / 3) if kind == "mixed" else budget
    if kind in ("layers", "mixed"):
        off = tuple(sorted(rng.sample(range(LAYERS), LAYERS - round(LAYERS * share))))
    if kind in ("heads and mlp", "mixed"):
        count = round(SWITCHES * share)
        for layer in set(range(LAYERS)) - set(off):
            heads[layer] = tuple(sorted(rng.sample(range(SWITCHES), count)))
            mlp[layer] = tuple(sorted(rng.sample(range(SWITCHES), count)))
    if kind in ("tokens", "mixed"):
        first = 1
        left = (share * LAYERS - first) / (LAYERS - first) * TOKENS
        keep = max(0, round(left) - (TOKENS - IMAGE_TOKENS))
        tokens = (TokenStage(first, keep, IMAGE_TOKENS),)
    fingerprint = str(graph.properties["fingerprint"])
    groups = dict.fromkeys(mlp, SWITCHES)
    return Plan(graph.name, fingerprint, LAYERS, off, heads, mlp, groups, tokens)


@dataclass(frozen=True)
class Bench:
    """One model, its prompt, and how to measure it.

    `planned` is a second model on the same parameters; plans are for it, so that neither side has
    to be changed between turns.
    """

    name: str
    stock: Any
    planned: Any
    inputs: dict[str, Tensor]
    graph: Graph
    executor: Executor
    clock: Callable[[], float]
    rounds: int

    def prefill(self, model: Any) -> Tensor:
        """Logits of the last token."""
        with torch.no_grad():
            return model(**self.inputs, logits_to_keep=1).logits

    def flops(self, model: Any) -> int:
        """Of a prefill, counted; the counter knows attention by its two products alone."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.prefill(model)
        return counter.get_total_flops()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one run."""
        start = self.clock()
        run()
        return self.clock() - start

    def ratio(self, base: Callable[[], float], other: Callable[[], float]) -> float:
        """Median of the rounds' ratios of seconds; the first two rounds warm up.

        Who comes first changes from round to round.
        """
        ratios = []
        for number in range(self.rounds + 2):
            if number % 2:
                over, under = other(), base()
            else:
                under, over = base(), other()
            ratios.append(over / under)
        return median(ratios[2:])


@dataclass(frozen=True)
class Row:
    """One figure and whether it meets its target.

    `ideal` and `realised` are time over the base model's; for decoding, the gain in tokens/s.
    """

    model: str
    plan: str
    budget: float
    mode: str
    ideal: float
    realised: float
    score: float
    target: float
    met: bool


def check_parity(bench: Bench, plan: Plan) -> None:
    """Raise Invalid unless narrowed and masked runs agree; leaves the plan attached."""
    gates = {}
    for stage in plan.tokens:
        image = bench.inputs["input_ids"] == IMAGE
        seen = DecoderInputs(image, torch.ones_like(image))
        gates[stage.layer] = Uniform(stage.keep).select(seen, stage.layer).keep.float()
    with MaskedExecutor(bench.stock, bench.graph).using(Gates.of([plan], bench.graph, gates)):
        expected = bench.prefill(bench.stock)
    bench.executor.detach()
    with bench.executor.using(plan):
        once = bench.prefill(bench.planned)
    bench.executor.attach(plan)
    for narrowed in (once, bench.prefill(bench.planned)):
        error = float((narrowed - expected).norm() / expected.norm())
        if not error <= PARITY:
            raise Invalid(f"{bench.name} under a plan is {error:.1e} off the masked model")


def prefills(bench: Bench, kind: str, budget: float, modes: list[str]) -> Iterator[Row]:
    """Realised over ideal of a prompt."""
    check_parity(bench, draw(bench.graph, kind, budget, 0))
    ideal = bench.flops(bench.planned) / bench.flops(bench.stock)
    seeds = count(1)

    def fresh() -> None:
        with bench.executor.using(draw(bench.graph, kind, budget, next(seeds))):
            bench.prefill(bench.planned)

    for mode in modes:
        sides = [bench.stock, bench.planned]
        if mode.endswith("compiled"):
            torch.compiler.reset()
            sides = [torch.compile(model) for model in sides]
        runs = [partial(bench.prefill, model) for model in sides]
        if mode.startswith("new"):
            runs[1] = fresh
            # Nothing to come back to after each input.
            bench.executor.detach()
        else:
            bench.executor.attach(draw(bench.graph, kind, budget, 0))
        realised = bench.ratio(*(partial(bench.seconds, run) for run in runs))
        score, target = realised / ideal, TARGETS[mode]
        yield Row(bench.name, kind, budget, mode, ideal, realised, score, target, score <= target)


def decoding(bench: Bench, kind: str, budget: float, tokens: int) -> Iterator[Row]:
    """Gain in tokens per second after the prompt, over what the bytes saved allow."""
    plan = draw(bench.graph, kind, budget, 0)
    bench.executor.attach(plan)
    word = torch.tensor([[5]])
    moved: dict[str, int] = {}

    @torch.no_grad()
    def side(name: str, model: Any, chosen: Plan | None) -> float:
        cache = DynamicCache()
        cached = {cache_argument(model.forward): cache}
        model(**bench.inputs, logits_to_keep=1, **cached)
        moved[name] = kv_bytes(cache) + weight_bytes(bench, chosen)

        def run() -> None:
            for _ in range(tokens):
                model(input_ids=word, **cached)

        return bench.seconds(run)

    base = partial(side, "base", bench.stock, None)
    models = {DECODE: bench.planned}
    if kind == "heads and mlp" and bench.name == "decoder":
        models[BUILT_SMALLER] = built_smaller(bench.stock.config, plan)
    for mode, model in models.items():
        gain = 1 / bench.ratio(base, partial(side, mode, model, plan))
        allowed = moved["base"] / moved[mode]
        score = (gain - 1) / (allowed - 1)
        met = score >= DECODE_TARGET
        yield Row(bench.name, kind, budget, mode, allowed, gain, score, DECODE_TARGET, met)


def built_smaller(config: LlamaConfig, plan: Plan) -> LlamaForCausalLM:
    """A stock decoder of the sizes that a plan of heads and neurons leaves, with random weights."""
    smaller = copy.deepcopy(config)
    smaller.head_dim = WIDTH // HEADS
    heads = HEADS * len(plan.heads[0]) // SWITCHES
    smaller.num_attention_heads = smaller.num_key_value_heads = heads
    smaller.intermediate_size = NEURONS * len(plan.mlp[0]) // SWITCHES
    return LlamaForCausalLM(smaller).eval()


def weight_bytes(bench: Bench, plan: Plan | None) -> int:
    """Bytes of the weights that one decoded token reads."""
    total = bench.stock.lm_head.weight.nbytes
    for site in bench.graph.sites:
        if plan is not None and site.layer in plan.layers_off:
            continue
        kept = None
        if plan is not None and site.kind in ("heads", "mlp"):
            kept = getattr(plan, site.kind).get(site.layer)
        share = 1 if kept is None else len(kept) / SWITCHES
        weights = [bench.stock.get_submodule(bound.module).weight for bound in site.bindings]
        total += int(share * sum(weight.nbytes for weight in weights))
    return total


def dispatch(bench: Bench, kind: str, budget: float) -> Row:
    """Activating a plan seen before, and leaving it, over a prefill of the base model."""
    plan = draw(bench.graph, kind, budget, 0)

    def switch() -> None:
        with bench.executor.using(plan):
            pass

    for _ in range(2):
        switch()
    runs = (partial(bench.prefill, bench.stock), switch)
    share = bench.ratio(*(partial(bench.seconds, run) for run in runs))
    met = share <= DISPATCH_TARGET
    return Row(bench.name, kind, budget, DISPATCH, 0, share, share, DISPATCH_TARGET, met)


def measure(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    for kind in options.plans:
        if bench.name == "decoder" and kind in ("tokens", "mixed"):
            continue
        for budget in options.budgets:
            yield from prefills(bench, kind, budget, options.modes)
            yield from decoding(bench, kind, budget, options.decode)
            if kind != "layers":
                yield dispatch(bench, kind, budget)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="budget 0.65, eager, three rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--models", nargs="+", default=["decoder", "llava"])
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=PLANS)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--modes", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each side")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    if options.quick:
        options.budgets, options.rounds, options.decode = (0.65,), 3, 8
        options.modes = [mode for mode in options.modes if not mode.endswith("compiled")]
    torch.set_num_threads(options.threads)
    # Behind a token stage every layer is a graph of its own.
    torch._dynamo.config.recompile_limit = 8 * LAYERS
    rows = []
    try:
        for name in options.models:
            model, inputs = build(name)
            graph = lower_model(model, name)
            twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
            clock = time.perf_counter if options.clock == "wall" else time.process_time
            bench = Bench(
                name, model, twin, inputs, graph, Executor(twin, graph), clock, options.rounds
            )
            for row in measure(bench, options):
                rows.append(row)
                print(_line(row), file=sys.stderr)
    except Invalid as reason:
        print(f"no figures: {reason}", file=sys.stderr)
        return 1
    if options.json:
        print_json({"options": vars(options), "rows": [asdict(row) for row in rows]})
    else:
        headers = ["model", "plan", "budget", "mode", "ideal", "realised", "score", "target", "met"]
        table(headers, [_cells(row) for row in rows])
    return 0


def _cells(row: Row) -> list[str]:
    numbers = [f"{value:.3f}" for value in (row.ideal, row.realised, row.score)]
    met = "yes" if row.met else "no"
    return [row.model, row.plan, f"{row.budget:g}", row.mode, *numbers, f"{row.target:g}", met]


def _line(row: Row) -> str:
    return "  ".join(_cells(row))


if __name__ == "__main__":
    sys.exit(main())
