"""Planned decoders against dense ones on a GPU, and planner's kernels against cuBLAS.

    python benchmarks/gpu.py [--minutes 7.5] [--output gpu.json] [--batches 8 1 32]
    python benchmarks/gpu.py --device cpu --tiny    # tries the harness; its times mean nothing

A LLaVA with the decoder of LLaVA-1.5-7B, random weights, bfloat16, 576 image and 64 text tokens.
Dense: the stock model, eager and under torch.compile. Planned: the same model as planner.compile
leaves it, under plans that leave out layers, heads and MLP groups, tokens, or some of each; by
planner's kernels, by PyTorch, and by whom ``auto`` takes. All sides run in CUDA graphs where they
can be captured, take medians, and decode with a cache of all tokens so far. No plan is solved here,
and nothing of OR-Tools is imported: survivors are drawn at random.

Every plan's logits by planner's kernels are first compared with those by PyTorch, and every op with
a float64 reference; what differs is not reported. A part that fails is named in the report, and the
others go on. The document in ``--output`` is written anew after every part, so that a run cut short
leaves what it had.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from gpu_decoders import LLAVA_7B, TINY, Decoder, Draw, Size, build, compare
from torch import Tensor
from torch.nn import functional as F

from planner.cli.console import print_json, table
from planner.files import write_text
from planner.ir.intervals import intervals_of
from planner.ir.lowering import lower_model
from planner.kernels.ops.attend import Attend
from planner.kernels.ops.project_columns import ProjectColumns
from planner.kernels.ops.project_rows import ProjectRows
from planner.kernels.survivors import Survivors, neuron_width
from planner.kernels.targets.autotune import on_device
from planner.kernels.triton.kernel import tensor_bytes
from planner.kernels.triton.launch import Launch, launch, recorded, target_for
from planner.kernels.triton.tiles import target_of

BUDGETS = (0.85, 0.65, 0.5)
KINDS = ("layers", "heads and mlp", "tokens", "all")
KERNELS = ("triton", "torch", "auto")
# Realised over ideal in prefill, and a matrix kernel's speed over cuBLAS's.
PREFILL_TARGET, CUBLAS_TARGET = 1.10, 0.85


class Clock:
    """Medians of runs, in CUDA graphs where there are any, until time is up."""

    def __init__(self, device: torch.device, minutes: float, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.end = time.perf_counter() + 60 * minutes

    def left(self) -> bool:
        """Whether there is time for another part."""
        return time.perf_counter() < self.end

    def captured(self, run: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
        """(the run as a CUDA graph, True), or (the run itself, False) where that fails."""
        if self.device.type != "cuda":
            return run, False
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            return run, False
        return graph.replay, True

    def seconds(self, run: Callable[[], Any], repeats: int = 1) -> float:
        """Median seconds of one run; each round is of `repeats`. A GPU warms up."""
        if self.device.type == "cuda":
            run()
        taken = []
        for _ in range(self.rounds):
            self._wait()
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            self._wait()
            taken.append((time.perf_counter() - start) / repeats)
        return median(taken)

    def tidy(self) -> None:
        """Give memory back: graphs have pools of their own, and modules refer to one another."""
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # of a GPU at fault
                torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Row:
    """One decoder, one phase. Times in milliseconds; ratios are to the best dense time."""

    batch: int
    decoder: str
    kernels: str
    budget: float
    phase: str
    milliseconds: float
    graph: bool
    ratio: float = 1.0
    ideal: float = 1.0

    @property
    def score(self) -> float:
        """Realised over ideal."""
        return self.ratio / self.ideal


@dataclass(frozen=True)
class KernelRow:
    """A kernel, or an op. `share` is its speed over cuBLAS's, over the copy bandwidth, or
    over everything dense."""

    block: str
    kernel: str
    rows: int
    microseconds: float
    predicted_microseconds: float
    tflops: float
    gb_per_s: float
    against: str
    share: float


# -- decoders -------------------------------------------------------------------------------------


def dense_rows(clock: Clock, decoder: Decoder) -> Iterator[Row]:
    """Both phases, eager and compiled."""
    modes = ("dense eager", "dense torch.compile")
    for mode in modes[: 1 if decoder.size is TINY else 2]:
        if mode == modes[1]:
            decoder.compile()
        for phase, milliseconds, graph in phases(clock, decoder):
            yield Row(decoder.batch, mode, "torch", 1.0, phase, milliseconds, graph)
    decoder.called = decoder.model


def planned_rows(clock: Clock, decoder: Decoder, draw: Draw, base: dict[str, float]) -> list[Row]:
    """Both phases under one plan; ValueError where kernels compute something else than PyTorch."""
    decoder.check(draw)
    rows, batch = [], decoder.batch
    for kernels in KERNELS:
        with decoder.under(draw, kernels):
            for phase, milliseconds, graph in phases(clock, decoder):
                ratio, ideal = milliseconds / base[phase], draw.ideal(decoder.size, batch, phase)
                place = (batch, draw.kind, kernels, draw.budget, phase)
                rows.append(Row(*place, milliseconds, graph, ratio, ideal))
    return rows


def phases(clock: Clock, decoder: Decoder) -> Iterator[tuple[str, float, bool]]:
    """(phase, milliseconds, whether in a CUDA graph) of a prompt, and of one token more."""
    yield "prefill", *measured(clock, decoder.prefill)
    decoder.read()
    yield "decode", *measured(clock, decoder.decode)


def measured(clock: Clock, run: Callable[[], Any]) -> tuple[float, bool]:
    """(milliseconds, whether in a CUDA graph)."""
    with torch.no_grad():
        replay, graph = clock.captured(run)
        return 1e3 * clock.seconds(replay), graph


# -- kernels --------------------------------------------------------------------------------------


def kernel_rows(clock: Clock, size: Size, batch: int, budget: float) -> Iterator[KernelRow]:
    """Every kernel of one layer under a plan of the budget."""
    cuda = clock.device.type == "cuda"
    capability = torch.cuda.get_device_capability(clock.device) if cuda else (8, 0)
    copy = copy_bandwidth(clock, size)
    draw = Draw("heads and mlp", budget)
    heads, neurons = draw.some(size.heads, 0), draw.neurons(size, 0)
    for phase, tokens in (("prefill", size.tokens), ("decode", 1)):
        for title, op in layer_ops(size, heads, neurons, batch, tokens):
            with recorded(target_of(capability)) as launches:
                op()
            for each in (on_device(one, clock.device) for one in launches):
                run, graph = clock.captured(partial(launch, each))
                seconds = clock.seconds(run, 20 if graph else 1)
                yield kernel_row(clock, f"{phase} {each.kernel.name}", title, each, seconds, copy)


def layer_ops(
    size: Size, heads: list[int], neurons: list[int], batch: int, tokens: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The ops of a layer on tensors without storage, each under a title."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    square, hidden = meta(size.hidden, size.hidden), meta(batch, tokens, size.hidden)
    lanes = [head * size.head_dim + lane for head in heads for lane in range(size.head_dim)]
    kept = Survivors.packed(intervals_of(lanes), device="meta")
    query = meta(batch, tokens, len(heads), size.head_dim).transpose(1, 2)
    key = meta(batch, len(heads), size.tokens, size.head_dim)
    every = Survivors.of([range(len(heads))], len(heads), device="meta")
    title = f"attention, {len(heads)} of {size.heads} heads"
    yield title, lambda: ProjectRows(hidden, square, None, kept).run(triton=True)
    attention = Attend(query, key, key, None, every, size.head_dim**-0.5, tokens > 1)
    yield title, lambda: attention.run(triton=True)
    mixed = meta(batch, tokens, len(lanes))
    yield title, lambda: ProjectColumns(mixed, square, None, kept).run(triton=True)
    up, down = meta(size.neurons, size.hidden), meta(size.hidden, size.neurons)
    width = neuron_width(size.neurons)
    survivors = Survivors.of([neurons], size.neurons, width, device="meta")
    first = ProjectRows(hidden, up, None, survivors, gate=up, activation="silu")
    inner = first.empty()
    title = f"MLP, {len(neurons)} of {size.neurons} neurons"
    yield title, lambda: first.run(triton=True)
    yield title, lambda: ProjectColumns(inner, down, None, survivors).run(triton=True)


def kernel_row(
    clock: Clock, name: str, title: str, each: Launch, seconds: float, copy: float
) -> KernelRow:
    """A launch's speed, against cuBLAS where it multiplies, otherwise against a copy."""
    moved = tensor_bytes(each)
    rows, flops, share, against = 0, 0, moved / seconds / copy, "copy"
    sizes = product_sizes(each)
    if sizes is not None:
        rows, depth, columns = sizes
        flops = 2 * rows * depth * columns
        x = torch.randn(rows, depth, dtype=torch.bfloat16, device=clock.device)
        weight = torch.randn(columns, depth, dtype=torch.bfloat16, device=clock.device)
        product, graph = clock.captured(lambda: F.linear(x, weight))
        share, against = clock.seconds(product, 20 if graph else 1) / seconds, "cuBLAS"
        moved = 2 * (rows * depth + columns * depth + rows * columns)
    predicted = each.kernel.seconds(each, target_for(each.arguments["out"]))
    speeds = (flops / seconds / 1e12, moved / seconds / 1e9)
    return KernelRow(title, name, rows, seconds * 1e6, predicted * 1e6, *speeds, against, share)


def op_rows(clock: Clock, size: Size, batch: int, budget: float) -> Iterator[KernelRow]:
    """The ops around attention by planner's kernels, against dense ones by PyTorch; ValueError
    where one differs from its float64 reference on the first sample."""
    kept = Draw("heads and mlp", budget).some(size.heads, 0)
    heads = Survivors.of([kept], size.heads, device=clock.device)
    features = heads.widened(size.head_dim)
    randn = partial(torch.randn, dtype=torch.bfloat16, device=clock.device)
    weight = randn(size.hidden, size.hidden) / size.hidden**0.5
    scale, title = size.head_dim**-0.5, f"heads, {len(kept)} of {size.heads}"
    for phase, tokens in (("prefill", size.tokens), ("decode", 1)):
        x, causal = randn(batch, tokens, size.hidden), tokens > 1
        query = randn(batch, tokens, size.heads, size.head_dim).transpose(1, 2)
        key, value = randn(2, batch, size.heads, size.tokens, size.head_dim)

        def project(x: Tensor, weight: Tensor, triton: bool) -> Tensor:
            return ProjectRows(x, weight, None, features, packed=False).run(triton=triton)

        def mix(q: Tensor, k: Tensor, v: Tensor, triton: bool, causal: bool = causal) -> Tensor:
            mixed = Attend(q, k, v, None, heads, scale, causal)
            return mixed.run(triton=triton)[:, :, : len(kept)]

        def mix_dense(q: Tensor, k: Tensor, v: Tensor, causal: bool = causal) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

        sides: list[tuple[str, Any, Any, tuple[Tensor, ...]]] = [
            ("project_rows", project, F.linear, (x, weight)),
            ("attend", mix, mix_dense, (query, key, value)),
        ]
        for name, op, dense, inputs in sides:
            first = [value if value is weight else value[:1] for value in inputs]
            want = op(*(value.double() for value in first), triton=False)
            compare(f"{phase} {name}", op(*inputs, triton=True)[:1], want)
            runs = (partial(op, *inputs, triton=True), partial(dense, *inputs))
            taken, stock = (measured(clock, run)[0] / 1e3 for run in runs)
            figures = (batch * tokens, taken * 1e6, 0.0, 0.0, 0.0)
            yield KernelRow(title, f"{phase} {name} op", *figures, "dense", stock / taken)


def product_sizes(each: Launch) -> tuple[int, int, int] | None:
    """(rows, depth, columns) of a dense product of what survives; None for other kernels."""
    given = each.arguments
    kept = given.get("slots", 0) * given.get("WIDTH", 0)
    sizes = {
        "project_rows": lambda: (given["depth"], kept * (1 + (given["gate_weight"] is not None))),
        "project_columns": lambda: (kept, given["features_out"]),
    }
    return (given["rows"], *sizes[each.kernel.name]()) if each.kernel.name in sizes else None


def copy_bandwidth(clock: Clock, size: Size) -> float:
    """Bytes per second of a copy, read and written."""
    elements = 2**14 if size is TINY else 2**29
    source = torch.zeros(elements, dtype=torch.bfloat16, device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.seconds(lambda: target.copy_(source))


# -- the report -----------------------------------------------------------------------------------


class Report:
    """Rows, and what went wrong; printed and written even where some parts failed."""

    def __init__(self, options: argparse.Namespace, clock: Clock) -> None:
        self.rows: list[Row] = []
        self.kernels: list[KernelRow] = []
        self.problems: list[str] = []
        self.options, self.clock = options, clock
        # Asked now: after a fault a GPU answers nothing.
        cuda = clock.device.type == "cuda"
        self.device = torch.cuda.get_device_name(clock.device) if cuda else "cpu"

    def part(self, name: str, work: Callable[[], None]) -> bool:
        """Run one part if there is time, and say whether it went well; what it raises is noted."""
        started = time.perf_counter()
        problems = len(self.problems)
        if not self.clock.left():
            self.problems.append(f"{name}: no time left")
            self.write()
            return False
        try:
            work()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            self.problems.append(f"{name}: {type(error).__name__}: {reason}")
            if self.options.verbose:
                traceback.print_exc()
        taken = time.perf_counter() - started
        outcome = self.problems[-1] if len(self.problems) > problems else f"{name}: done"
        print(f"{outcome}, {taken:.1f} s", file=sys.stderr, flush=True)
        self.write()
        self.clock.tidy()
        return len(self.problems) == problems

    def write(self) -> None:
        """The document so far, whole or not at all."""
        if self.options.output is not None:
            write_text(self.options.output, json.dumps(self.document(), indent=1) + "\n")

    def document(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {
            "device": self.device,
            "meaningless": self.device == "cpu",
            "versions": {"torch": torch.__version__, "triton": triton.__version__},
            "options": {name: str(value) for name, value in vars(self.options).items()},
            "decoders": [asdict(row) | {"score": row.score} for row in self.rows],
            "kernels": [asdict(row) for row in self.kernels],
            "problems": self.problems,
        }

    def print(self) -> None:
        """Tables, what is missing from them, and the targets."""
        if self.device == "cpu":
            print("these times are of a CPU, partly of an interpreter: they mean nothing")
        headers = ["batch", "decoder", "kernels", "budget", "phase", "ms", "graph"]
        headers += ["ratio", "ideal", "score"]
        table(headers, [_cells(row) for row in self.rows])
        print()
        headers = ["block", "kernel", "rows", "us", "predicted", "TFLOP/s", "GB/s", "of", "share"]
        table(headers, [_kernel_cells(row) for row in self.kernels])
        for problem in self.problems:
            print(f"not reported: {problem}")
        print(
            f"targets: prefill score at most {PREFILL_TARGET} at batch 8, "
            f"matrix kernels at least {CUBLAS_TARGET} of cuBLAS"
        )


def _cells(row: Row) -> list[str]:
    ratios = [f"{value:.3f}" for value in (row.ratio, row.ideal, row.score)]
    graph = "yes" if row.graph else "no"
    times = [f"{row.milliseconds:.3f}", graph]
    place = [str(row.batch), row.decoder, row.kernels, f"{row.budget:g}", row.phase]
    return [*place, *times, *ratios]


def _kernel_cells(row: KernelRow) -> list[str]:
    numbers = (row.microseconds, row.predicted_microseconds, row.tflops, row.gb_per_s)
    return [
        row.block,
        row.kernel,
        str(row.rows),
        *(f"{number:.1f}" for number in numbers),
        row.against,
        f"{row.share:.2f}",
    ]


def run_batch(report: Report, clock: Clock, decoder: Decoder) -> None:
    """Dense decoders, then planned ones: with everything left in, and under all plans."""
    best: dict[str, float] = {}
    batch = decoder.batch

    def dense() -> None:
        for row in dense_rows(clock, decoder):
            best[row.phase] = min(row.milliseconds, best.get(row.phase, row.milliseconds))
            report.rows.append(row)

    report.part(f"batch {batch}, dense", dense)
    if len(best) < 2:
        return
    draws = [Draw(kind, budget) for budget in report.options.budgets for kind in KINDS]
    for draw in draws:
        name = f"batch {batch}, {draw.kind} at {draw.budget:g}"

        def planned(draw: Draw = draw) -> None:
            report.rows += planned_rows(clock, decoder, draw, best)

        report.part(name, planned)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the harness")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 1, 32])
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--minutes", type=float, default=7.5, help="no new part after that")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    parser.add_argument("--output", type=Path, help="write the JSON document here")
    parser.add_argument("--json", action="store_true", help="print the JSON document instead")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of what failed")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: --device cpu --tiny tries the harness", file=sys.stderr)
        return 2
    size = TINY if options.tiny else LLAVA_7B
    clock = Clock(device, options.minutes, options.rounds)
    report = Report(options, clock)
    model = build(size, device)
    graph = lower_model(model, "llava")
    for number, batch in enumerate(options.batches):
        run_batch(report, clock, Decoder(model, graph, size, batch))
        if number == 0:
            for what, rows in (("kernels", kernel_rows), ("ops", op_rows)):
                found = rows(clock, size, batch, 0.65)
                report.part(f"batch {batch}, {what}", partial(report.kernels.extend, found))
    if options.json:
        print_json(report.document())
    else:
        report.print()
    return 0 if report.rows else 1


if __name__ == "__main__":
    sys.exit(main())
