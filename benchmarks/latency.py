"""Are milliseconds kept? Predictions of a device file against passes on this machine.

    planner calibrate -o here.json
    python benchmarks/latency.py --device here.json [--plans 200] [--requests 500] [--json]

Passes are prompts and decoded tokens of models with random weights, of other sizes than those that
`planner calibrate` fits to, under random plans. They are predicted as those of any model, and after
what `planner calibrate --model` does for each of them, at the usual pace of the machine and by the
clock. Requests come with prompts of several lengths and deadlines of several shares of the base
model's time; each is served by the plan for a latency budget of its deadline, and by one that a
governor picks who knows how fast the machine was lately. On time are requests whose pass took no
longer, by the clock; utilisation is the share of their deadlines that passes took. What the same
pass, or the same request, takes when it is repeated says how much of an error no prediction could
avoid, and the machine's pace how much it changes by itself.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from planner.cli.console import print_json, table
from planner.ir.cost.measured_device import MeasuredDevice
from planner.models.profiling import machine_of, profile_model
from planner.models.profiling.operator_cases import Bench
from planner.models.profiling.stopwatch import stopwatch_for
from planner.models.profiling.subjects import Pass, Subject
from planner.models.profiling.sweep import Partial
from planner.models.profiling.whole_passes import quantiles, repeats_differ, timed
from planner.plan import Plan
from planner.planning.compiler import plan_graph
from planner.planning.device_file import read_device, save_device
from planner.planning.plan_costs import pricing_for
from planner.planning.request import Request
from planner.progress import progress_bar
from planner.serving.governor import SlowDown
from planner.solver import Infeasible

# Width and layers of the models, and whether they see; other ones than the calibration's.
SUBJECTS = ((384, 6, False), (768, 4, True))
MOST_TOKENS = 500
# Of requests: text tokens, and deadlines over the base model's seconds.
TEXTS, SHARES = (40, 120, 300), (0.6, 0.7, 0.8, 0.9)
# Deadlines of the plans that a governor chooses from.
LADDER = tuple(n / 20 for n in range(9, 31))


def calibrated(subjects: Sequence[Subject], device: MeasuredDevice, work: Path) -> MeasuredDevice:
    """The device after `planner calibrate --model` for every subject, in a file of its own."""
    for number, subject in enumerate(subjects):
        path = work / f"model-{number}.partial"
        device, _ = profile_model(device, subject, MOST_TOKENS, path, progress_bar)
    device = replace(device, name=str(work / "device.json"))
    save_device(work / "device.json", device)
    return device


def plans(
    subjects: Sequence[Subject],
    devices: dict[str, MeasuredDevice],
    count: int,
    partial: Partial,
    pace: float,
) -> dict[str, Any]:
    """Errors of predictions for so many random plans, by several devices.

    At the machine's usual `pace`, and by the clock with the last device.
    """
    with progress_bar("plans") as progress:
        found = timed(subjects, count, MOST_TOKENS, 2, partial, progress, pace)
    sorts = {
        "all": found,
        "prompts": [one for one in found if not one.one.decodes],
        "tokens": [one for one in found if one.one.decodes],
    }
    document: dict[str, Any] = {}
    for how, device in devices.items():
        for name, some in sorts.items():
            document[f"{name}, {how}"] = _off([one.error(device) for one in some])
    clock = [one.predicted(device) / median(t.seconds for t in one.every) - 1 for one in found]
    document["all, by the clock"] = _off(clock)
    slower = [taken.pace / pace - 1 for one in found for taken in one.every]
    document["the machine's pace"] = _off(slower)
    return document | {"repeats differ": {"median": repeats_differ(found)}}


def _off(errors: Sequence[float]) -> dict[str, float]:
    return {"count": len(errors), "bias": float(np.median(errors)), **quantiles(errors)}


def requests(subject: Subject, device: MeasuredDevice, count: int) -> dict[str, dict[str, float]]:
    """How so many requests keep their deadlines, by who plans.

    By the file, a plan keeps back what one pass in a hundred is late by. A governor knows plans of
    many costs and how slow the machine was for the requests before; both serve every request.
    """
    rng, watch = random.Random(2), stopwatch_for(subject.bench.place)
    served = {(t, s): planned(subject, device, t, s) for t in TEXTS for s in SHARES}
    ladders = {t: ladder(subject, device, t) for t in TEXTS}
    for one in [*served.values(), *(one for rungs in ladders.values() for one in rungs)]:
        for _ in range(2):  # the second copies what frozen plans keep
            one.serve()
    by: dict[str, dict[Any, list[float]]] = {"by the file": {}, "by a governor": {}}
    planned_for: dict[str, list[float]] = {name: [] for name in by}
    slow = SlowDown()
    with progress_bar("requests") as progress:
        for number in range(count):
            which = rng.choice(TEXTS), rng.choice(SHARES)
            due = served[which].due
            picked = chosen(ladders[which[0]], due, slow.quantile)
            turns = {"by the file": served[which], "by a governor": picked}
            for name in rng.sample(list(turns), len(turns)):
                one = turns[name]
                seconds = watch.seconds([one.serve])
                by[name].setdefault(which, []).append(seconds / due)
                planned_for[name].append(one.seconds / due)
                slow.learn(one.seconds, seconds)
            progress(number + 1, count)
    margin = {"margin for late ones": device.on(subject.graph).late(subject.graph.dtype_bytes)}
    return {
        name: {**kept(used), "planned over deadline": median(planned_for[name])}
        | (margin if name == "by the file" else {})
        for name, used in by.items()
    }


def ladder(subject: Subject, device: MeasuredDevice, text_tokens: int) -> list[Served]:
    """Plans from the cheapest on."""
    found = []
    for share in LADDER:
        with suppress(Infeasible):
            found.append(planned(subject, device, text_tokens, share))
    return sorted(found, key=lambda one: one.seconds)


def kept(used: dict[Any, list[float]]) -> dict[str, float]:
    """Of shares of deadlines that requests took, by what they were."""
    every = np.array([share for some in used.values() for share in some])
    same = [share / median(some) for some in used.values() for share in some]
    return {
        "count": len(every),
        "on time": float(np.mean(every <= 1)),
        "median over deadline": float(np.quantile(every, 0.5)),
        "p99 over deadline": float(np.quantile(every, 0.99)),
        "utilisation": float(np.mean(np.minimum(every, 1))),
        "p99 over median of the same request": float(np.quantile(same, 0.99)),
    }


class Served(NamedTuple):
    """A plan for a deadline."""

    serve: Callable[[], None]
    due: float  # seconds
    seconds: float  # that are predicted


def chosen(rungs: Sequence[Served], due: float, slower: float) -> Served:
    """The dearest that is in time on a machine so many times slower, or the cheapest."""
    return max(
        (one for one in rungs if one.seconds * slower <= due),
        key=lambda one: one.seconds,
        default=rungs[0],
    )


def planned(subject: Subject, device: MeasuredDevice, text_tokens: int, share: float) -> Served:
    """The plan for a deadline that is a share of the base model's time."""
    load, graph = subject.load(text_tokens), subject.graph
    dense = Plan.of(graph)
    base = pricing_for(dense, graph, load, "model", device.on(graph)).cost_of(dense)["latency"]
    asked = Request(
        graph.name,
        f"latency={share * base}s",
        utilities="prior",
        device=device.name,
        text_tokens=text_tokens,
    )
    plan = plan_graph(graph, asked).plan
    prompt = subject.prompt(Pass(plan, load, decodes=False))

    @torch.no_grad()
    def serve() -> None:
        with subject.session.under(plan):
            prompt()

    return Served(serve, share * base, plan.cost["latency"]["plan"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", type=Path, required=True, help="file of planner calibrate")
    parser.add_argument("--plans", type=int, default=200)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--work", type=Path, help="folder from which a run that was killed goes on")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    device = read_device(options.device)
    torch.set_num_threads(int(device.machine["threads"]))
    results = {}
    for precision in device.measured:
        place = "cuda" if device.machine["cuda"] else "cpu"
        bench = Bench(torch.device(place), getattr(torch, precision))
        here = machine_of(bench.place)
        if here != device.machine:
            differs = [name for name in here if here[name] != device.machine.get(name)]
            print(f"the device file is of another {', '.join(differs)}", file=sys.stderr)
            return 1
        with tempfile.TemporaryDirectory() as folder:
            work = (options.work or Path(folder)) / precision
            work.mkdir(parents=True, exist_ok=True)
            subjects = [Subject.made(bench, *which) for which in SUBJECTS]
            known = calibrated(subjects, device, work)
            partial = Partial.at(work / "plans.partial", [here, options.plans])
            devices = {"as any model": device, "calibrated": known}
            results[precision] = {
                "plans": plans(
                    subjects, devices, options.plans, partial, device.measured[precision].pace
                ),
                "requests": requests(subjects[-1], known, options.requests),
            }
    document = {
        "machine": device.machine,
        "load": os.getloadavg(),
        "operators": {name: known.errors for name, known in device.measured.items()},
        **results,
    }
    if options.json:
        print_json(document)
    else:
        show(document, results)
    return 0


def show(document: dict[str, Any], results: dict[str, Any]) -> None:
    print(document["machine"], "load", document["load"])
    names = ["median", "p90", "p95", "bias", "count"]
    rows = []
    for precision, found in results.items():
        errors = {"operators": document["operators"][precision], **found["plans"]}
        for what, off in errors.items():
            cells = [f"{off[name]:.3f}" if name in off else "" for name in names[:-1]]
            rows.append([f"{what}, {precision}", *cells, str(off.get("count", ""))])
    table(["predictions are off", *names], rows)
    for precision, found in results.items():
        print()
        by = found["requests"]
        names = list(dict.fromkeys(name for figures in by.values() for name in figures))
        rows = [[n, *(f"{f[n]:.3f}" if n in f else "" for f in by.values())] for n in names]
        table([f"requests, {precision}", *by], rows)


if __name__ == "__main__":
    sys.exit(main())
