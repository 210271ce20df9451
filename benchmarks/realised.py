"""Does a plan save the time that it saves in FLOPs? Realised over ideal, on this machine.

    python benchmarks/realised.py [--quick] [--json] [--threads N] [--clock wall|cpu]
        [--dtypes float32 bfloat16] [--history FILE]

A LLaMA-shaped decoder (8 layers, width 1024, 640 tokens) and a LLaVA of that size, in float32 and,
where the CPU multiplies in it, in bfloat16, run under layer plans, head and MLP plans, token plans
and mixed ones. Realised is measured time over the base model's. All sides run in this process one
after the other, round by round, and the median of the rounds' ratios counts: what slows the machine
for a while slows all sides of a round. Ideal is the same ratio of FLOPs, counted on what runs. All
sides run eagerly, or all under torch.compile, or all compiled with frozen weights (inductor then
packs them ahead). When decoding, the gain in tokens per second is set against bytes: the weights,
keys and values that a token reads in the base model, over those under the plan.

Beside the base model runs a stock model cut to the plan by hand (`by_hand`), whose score says what
the runtime itself loses on smaller tensors. Under a plan, linears multiply in a way of their own
(`kept_linear`). So there is a second base model, whose linears do: what a plan gains over that one
is due to what it leaves out. Nothing is reported unless sides agree with the masked model, or the
stock one.

`--history` adds the run, with its date and its machine, to a file, which docs/realised.md shows.

On a machine that is busy with other things, ``--clock cpu --threads 1`` counts this process's
seconds only.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._inductor.config
from by_hand import cut_by_hand
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from planner.cli.console import print_json, table
from planner.documents import read_json
from planner.files import write_text
from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.kernels.ops.kept_linear import kept_linear
from planner.models.profiling.device_profile import machine_of
from planner.models.profiling.subjects import IMAGE, random_model
from planner.models.running.kv_cache import cache_argument, kv_bytes
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.session import Session
from planner.models.running.skipping import session_on
from planner.models.tokens.selectors import DecoderInputs, select_tokens
from planner.plan import Plan, TokenStage
from planner.planning.selectors import Uniform
from planner.planning.switches import mlp_switches

LAYERS, WIDTH, HEADS, TOKENS = 8, 1024, 16, 640
GROUPS = mlp_switches(WIDTH * 43 // 16, HEADS)
IMAGE_SIZE, IMAGE_TOKENS = 336, 576
BUDGETS = (0.5, 0.65, 0.85)
DTYPES = ("float32", "bfloat16")
PLANS = ("layers", "heads and mlp", "tokens", "mixed")
# Realised over ideal, at most.
PREFILLS = {
    "fixed plan": 1.05,
    "new plan per input": 1.08,
    "fixed plan, compiled": 1.05,
    "fixed plan, frozen": 1.05,
}
# Share of the gain that the bytes saved allow, at least.
DECODINGS = {"decoding": 0.9, "decoding, compiled": 0.9}
# Planning and dispatch over a prefill of the base model, at most.
DISPATCH = {"dispatch": 0.01}
TARGETS = PREFILLS | DECODINGS | DISPATCH
# By precision.
PARITY = {torch.float32: 1e-5, torch.bfloat16: 0.03}
# Decoded over and over.
WORD = torch.tensor([[5]])


class Invalid(Exception):
    """What is measured computes something else than it should."""


def build(kind: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """A random model and its prompt of `TOKENS` tokens."""
    model = random_model(WIDTH, LAYERS, 0 if kind == "decoder" else IMAGE_SIZE).to(dtype)
    ids = torch.randint(3, 999, (1, TOKENS))
    if kind == "decoder":
        return model, {"input_ids": ids}
    ids[:, 32 : 32 + IMAGE_TOKENS] = IMAGE
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=dtype)
    return model, {"input_ids": ids, "pixel_values": pixels}


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
        for layer in set(range(LAYERS)) - set(off):
            heads[layer] = tuple(sorted(rng.sample(range(HEADS), round(HEADS * share))))
            mlp[layer] = tuple(sorted(rng.sample(range(GROUPS), round(GROUPS * share))))
    if kind in ("tokens", "mixed"):
        first = 1
        left = (share * LAYERS - first) / (LAYERS - first) * TOKENS
        keep = max(0, round(left) - (TOKENS - IMAGE_TOKENS))
        tokens = (TokenStage(first, keep, IMAGE_TOKENS),)
    fingerprint = str(graph.properties["fingerprint"])
    groups = dict.fromkeys(mlp, GROUPS)
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
    clock: Callable[[], float]
    rounds: int

    @staticmethod
    def of(name: str, dtype: torch.dtype, options: argparse.Namespace) -> Bench:
        """Of the random model of a name."""
        model, inputs = build(name, dtype)
        twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        clock = time.perf_counter if options.clock == "wall" else time.process_time
        return Bench(name, model, twin, inputs, lower_model(model, name), clock, options.rounds)

    @cached_property
    def session(self) -> Session:
        """That of the second model, for which plans hold when it is called as it is."""
        return session_on(self.planned, self.graph, freeze=True)

    def masked(self, plan: Plan) -> Tensor:
        """Logits of the last token by masks, which what is narrowed must give too."""
        gates = {stage.layer: self.keep(stage).float() for stage in plan.tokens}
        with MaskedExecutor(self.stock, self.graph).using(Gates.of([plan], self.graph, gates)):
            return self.prefill(self.stock)

    def prefill(self, model: Any) -> Tensor:
        """Logits of the last token."""
        with torch.no_grad():
            logits: Tensor = model(**self.inputs, logits_to_keep=1).logits
        return logits

    def read(self, model: Any) -> dict[str, DynamicCache]:
        """The prompt; the argument that goes on from there."""
        cached = {cache_argument(model.forward): DynamicCache()}
        with torch.no_grad():
            model(**self.inputs, logits_to_keep=1, **cached)
        return cached

    def decode(self, model: Any, cached: dict[str, DynamicCache]) -> Tensor:
        """Logits of the next token."""
        with torch.no_grad():
            logits: Tensor = model(input_ids=WORD, **cached).logits
        return logits

    def flops(self, model: Any) -> int:
        """Of a prefill, counted; the counter knows attention by its two products alone."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.prefill(model)
        return int(counter.get_total_flops())

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one run."""
        start = self.clock()
        run()
        return self.clock() - start

    def by_hand(self, plan: Plan) -> Any:
        """The stock model cut to a plan by hand."""
        left = None
        for stage in plan.tokens:
            left = self.keep(stage)[0].nonzero()[:, 0]
        return cut_by_hand(self.stock, plan, self.graph, left)

    def keep(self, stage: TokenStage) -> Tensor:
        """Which tokens a stage lets go on, shape (1, tokens), bool."""
        image = self.inputs["input_ids"] == IMAGE
        seen = DecoderInputs(image, torch.ones_like(image))
        return select_tokens(Uniform(stage.keep), seen, stage.layer).keep

    def ratios(self, sides: Sequence[Callable[[], float]]) -> list[float]:
        """Of the seconds of every side but the first over those of the first; medians of rounds.

        The first two rounds warm up. Sides come in another order each round: who runs after whom
        matters.
        """
        rounds = []
        for number in range(self.rounds + 2):
            order = random.Random(number).sample(range(len(sides)), len(sides))
            seconds = {index: sides[index]() for index in order}
            rounds.append([seconds[index] / seconds[0] for index in range(1, len(sides))])
        return [median(ratios) for ratios in zip(*rounds[2:], strict=True)]


# A model, a kind of plans, and a budget.
Case = tuple[Bench, str, float]


@dataclass(frozen=True)
class Row:
    """One figure and whether it meets its target.

    `ideal` and `realised` are time over the base model's; for decoding, the gain in tokens/s.
    `by_hand` is the score of the stock model cut by hand, `same_products` that of the plan over the
    second base model; None for dispatch.
    """

    model: str
    dtype: str
    plan: str
    budget: float
    mode: str
    ideal: float
    realised: float
    score: float
    by_hand: float | None
    same_products: float | None
    target: float
    met: bool

    @staticmethod
    def of(
        case: Case,
        mode: str,
        ideal: float,
        realised: float,
        score: float,
        by_hand: float | None = None,
        same_products: float | None = None,
    ) -> Row:
        """With the mode's target: decoding is to gain at least that, the others at most take it."""
        target = TARGETS[mode]
        met = score >= target if mode in DECODINGS else score <= target
        bench, kind, budget = case
        figures = (ideal, realised, score, by_hand, same_products)
        dtype = str(bench.stock.dtype).removeprefix("torch.")
        return Row(bench.name, dtype, kind, budget, mode, *figures, target, met)


def check(what: str, logits: Tensor, expected: Tensor) -> None:
    """Raise Invalid unless both are the same up to rounding."""
    error = float((logits - expected).float().norm() / expected.float().norm())
    if not error <= PARITY[expected.dtype]:
        raise Invalid(f"{what} is {error:.1e} off")


def check_parity(bench: Bench, plan: Plan, by_hand: Any) -> Tensor:
    """Raise Invalid unless narrowed and masked runs agree; leaves the plan attached.

    Returns:
        The masked model's logits.
    """
    expected = bench.masked(plan)
    bench.session.begin_anew(None)
    with bench.session.under(plan):
        once = bench.prefill(bench.planned)
    bench.session.obey(plan)
    runs = {
        "under a plan": once,
        "under an attached plan": bench.prefill(bench.planned),
        "cut by hand": bench.prefill(by_hand),
    }
    for how, logits in runs.items():
        check(f"{bench.name} {how}", logits, expected)
    return expected


def prefills(case: Case, modes: list[str]) -> Iterator[Row]:
    """Realised over ideal of a prompt."""
    bench, kind, budget = case
    plan = draw(bench.graph, kind, budget, 0)
    by_hand = bench.by_hand(plan)
    expected = check_parity(bench, plan, by_hand)
    ideal = bench.flops(bench.planned) / bench.flops(bench.stock)
    seeds = count(1)

    def fresh() -> None:
        with bench.session.under(draw(bench.graph, kind, budget, next(seeds))):
            bench.prefill(bench.planned)

    turned = with_same_products(bench.stock)
    check(f"{bench.name} base", bench.prefill(turned), bench.prefill(bench.stock))
    for mode in modes:
        models = [bench.stock, bench.planned, by_hand, turned]
        bench.session.obey(plan)
        with compiling(mode):
            if mode.endswith(("compiled", "frozen")):
                models = [torch.compile(model, dynamic=False) for model in models]
                for how, model in zip(("under a plan", "cut by hand"), models[1:]):
                    check(f"{bench.name} {how}, {mode},", bench.prefill(model), expected)
            runs: list[Callable[[], object]] = [partial(bench.prefill, m) for m in models]
            if mode.startswith("new"):
                runs[1] = fresh
                # Nothing to come back to after each input.
                bench.session.begin_anew(None)
            realised, cut, same = bench.ratios([partial(bench.seconds, run) for run in runs])
        scores = [share / ideal for share in (realised, cut, realised / same)]
        yield Row.of(case, mode, ideal, realised, *scores)


@contextmanager
def compiling(mode: str) -> Iterator[None]:
    """Models compiled inside are compiled anew, with frozen weights where the mode says so."""
    torch.compiler.reset()
    with torch._inductor.config.patch(freezing=mode.endswith("frozen")):
        yield


def with_same_products(stock: Any) -> Any:
    """A copy of a model on the same parameters; its linears multiply as planner's under a plan."""
    model = copy.deepcopy(stock, {id(p): p for p in stock.parameters()})
    for module in model.get_decoder().layers.modules():
        if isinstance(module, nn.Linear):
            product = partial(kept_linear, weight=module.weight, bias=module.bias)
            module.__dict__["forward"] = product  # mypy lets nobody assign to a method
    return model


def decodings(case: Case, modes: list[str], tokens: int) -> Iterator[Row]:
    """Gain in tokens per second after the prompt, over what the bytes saved allow."""
    bench, kind, budget = case
    plan = draw(bench.graph, kind, budget, 0)
    bench.session.obey(plan)
    moved: dict[Any, int] = {}

    def side(model: Any, chosen: Plan | None, compiled: bool) -> float:
        cached = bench.read(model)
        (cache,) = cached.values()
        moved[model] = kv_bytes(cache) + weight_bytes(bench, chosen)
        step = torch.compile(model, dynamic=True) if compiled else model

        def run() -> None:
            for _ in range(tokens):
                bench.decode(step, cached)

        return bench.seconds(run)

    by_hand, turned = bench.by_hand(plan), with_same_products(bench.stock)
    for one, other in ((bench.planned, by_hand), (turned, bench.stock)):
        expected = bench.decode(other, bench.read(other))
        check(f"{bench.name} decoding", bench.decode(one, bench.read(one)), expected)
    models = [(bench.stock, None), (bench.planned, plan), (by_hand, plan), (turned, None)]
    for mode in modes:
        with compiling(mode):
            sides = [partial(side, *model, mode.endswith("compiled")) for model in models]
            planned, cut, same = bench.ratios(sides)
        allowed = moved[bench.stock] / moved[bench.planned]
        gains = [1 / planned, 1 / cut, same / planned]
        scores = [(gain - 1) / (allowed - 1) for gain in gains]
        yield Row.of(case, mode, allowed, gains[0], *scores)


def weight_bytes(bench: Bench, plan: Plan | None) -> int:
    """Bytes of the weights that one decoded token reads."""
    total: int = bench.stock.lm_head.weight.nbytes
    for site in bench.graph.sites:
        share = 1.0
        if plan is not None:
            kept = plan.kept(site)
            share = len(kept.switches) / kept.of
        weights = [bench.stock.get_submodule(bound.module).weight for bound in site.bindings]
        total += int(share * sum(weight.nbytes for weight in weights))
    return total


def dispatch(case: Case) -> Row:
    """Activating a plan seen before, and what a pass does about it, over a base prefill."""
    bench, kind, budget = case
    plan = draw(bench.graph, kind, budget, 0)

    def switch() -> None:
        with bench.session.under(plan):
            ready = bench.session.implementation.preparing.ready(bench.session.program)
            ready.put_in_place()
            ready.take_away()

    for _ in range(2):
        switch()
    runs = (partial(bench.prefill, bench.stock), switch)
    (share,) = bench.ratios([partial(bench.seconds, run) for run in runs])
    return Row.of(case, "dispatch", 0, share, share)


def measure(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    for kind in options.plans:
        if bench.name == "decoder" and kind in ("tokens", "mixed"):
            continue
        for budget in options.budgets:
            case = (bench, kind, budget)
            modes = [mode for mode in options.modes if mode in PREFILLS]
            yield from prefills(case, modes)
            modes = [mode for mode in options.modes if mode in DECODINGS]
            yield from decodings(case, modes, options.decode)
            if kind != "layers" and "dispatch" in options.modes:
                yield dispatch(case)


def options_of(doc: str, budgets: Sequence[float]) -> argparse.ArgumentParser:
    """The options of a benchmark that times models side by side."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--budgets", nargs="+", type=float, default=budgets)
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    return parser


def main() -> int:
    parser = options_of(__doc__, BUDGETS)
    parser.add_argument("--quick", action="store_true", help="budget 0.65, eager, three rounds")
    parser.add_argument("--models", nargs="+", default=["decoder", "llava"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=dtypes_at_hand())
    parser.add_argument("--history", type=Path, help="JSON file that the run is added to")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=PLANS)
    parser.add_argument("--modes", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded")
    parser.add_argument("--show", action="store_true", help="print the --history, and run nothing")
    options = parser.parse_args()
    # A run that is told to end reports what it has, as one that is interrupted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.show:
        print(shown(read_json(options.history, "history")))
        return 0
    if options.quick:
        options.budgets, options.rounds, options.decode = (0.65,), 3, 8
        options.modes = [mode for mode in options.modes if "," not in mode]
    torch.set_num_threads(options.threads)
    # Behind a token stage every layer is a graph of its own.
    torch._dynamo.config.recompile_limit = 8 * LAYERS
    rows = []
    try:
        for name, dtype in itertools.product(options.models, options.dtypes):
            bench = Bench.of(name, getattr(torch, dtype), options)
            for row in measure(bench, options):
                rows.append(row)
                print(_line(row), file=sys.stderr)
    except Invalid as reason:
        print(f"no figures: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: what follows is what was measured", file=sys.stderr)
    run = {
        "date": date.today().isoformat(),
        "machine": machine_of(torch.device("cpu")),
        "load": round(os.getloadavg()[1], 1),
        "options": vars(options) | {"history": None},
        "rows": [asdict(row) for row in rows],
    }
    if options.history is not None:
        add_to(options.history, run)
    if options.json:
        print_json(run)
    else:
        print(run["machine"])
        headers = [field.name.replace("_", " ") for field in fields(Row)]
        table(headers, [_cells(row) for row in rows])
    return 0


def dtypes_at_hand() -> list[str]:
    """float32, and bfloat16 where the CPU has instructions for its products."""
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return list(DTYPES[: 1 + has_bfloat16])


def add_to(history: Path, run: dict[str, Any]) -> None:
    """Add a run to a file of runs."""
    runs = read_json(history, "history") if history.is_file() else []
    write_text(history, json.dumps([*runs, run], indent=1) + "\n")


def shown(runs: Sequence[dict[str, Any]]) -> str:
    """Runs of a history as a table in Markdown."""
    heads = ["date", "machine, threads, load", "model, plan, budget", "mode", "realised / ideal"]
    heads += ["cut by hand", "same products"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for run in runs:
        machine = run["machine"]
        where = f"{machine['processor']}, {machine['threads']}, {run['load']}"
        for row in run["rows"]:
            case = f"{row['model']} {row['dtype']}, {row['plan']}, {row['budget']:g}"
            scores = [row[name] for name in ("score", "by_hand", "same_products")]
            figures = ["" if score is None else f"{score:.2f}" for score in scores]
            lines.append(f"| {' | '.join([run['date'], where, case, row['mode'], *figures])} |")
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    numbers = [row.ideal, row.realised, row.score, row.by_hand, row.same_products]
    cells = ["" if number is None else f"{number:.3f}" for number in numbers]
    met = "yes" if row.met else "no"
    return [
        row.model,
        row.dtype,
        row.plan,
        f"{row.budget:g}",
        row.mode,
        *cells,
        f"{row.target:g}",
        met,
    ]


def _line(row: Row) -> str:
    return "  ".join(_cells(row))


if __name__ == "__main__":
    sys.exit(main())
