"""Are milliseconds kept? Predictions of a device file against passes on this machine.

    planner calibrate -o here.json
    python benchmarks/latency.py --device here.json [--plans 200] [--requests 500] [--json]

Passes are prompts and decoded tokens of models with random weights, of other sizes than those that
`planner calibrate` fits to, under random plans. They are predicted as those of any model, and after
what `planner calibrate --model` does for each of them. Requests come with prompts of several
lengths and deadlines of several shares of the base model's time; each is served by the plan for a
latency budget of its deadline. On time are requests whose pass took no longer, by the clock of the
calibration; utilisation is the share of their deadlines that passes took. What the same pass, or
the same request, takes when it is repeated says how much of an error no prediction could avoid.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

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

# Width and layers of the models, and whether they see; other ones than the calibration's.
SUBJECTS = ((384, 6, False), (768, 4, True))
MOST_TOKENS = 500
# Of requests: text tokens, and deadlines over the base model's seconds.
TEXTS, SHARES = (40, 120, 300), (0.6, 0.7, 0.8, 0.9)


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
) -> dict[str, Any]:
    """Errors of predictions for so many random plans, by several devices."""
    with progress_bar("plans") as progress:
        found = timed(subjects, count, MOST_TOKENS, 2, partial, progress)
    sorts = {
        "all": found,
        "prompts": [one for one in found if not one.one.decodes],
        "tokens": [one for one in found if one.one.decodes],
    }
    document: dict[str, Any] = {}
    for how, device in devices.items():
        for name, some in sorts.items():
            errors = [one.error(device) for one in some]
            bias = float(np.median(errors))
            document[f"{name}, {how}"] = {"count": len(some), "bias": bias, **quantiles(errors)}
    return document | {"repeats differ": {"median": repeats_differ(found)}}


def requests(subject: Subject, device: MeasuredDevice, count: int) -> dict[str, Any]:
    """How so many requests keep their deadlines."""
    rng, watch = random.Random(2), stopwatch_for(subject.bench.place)
    served = {(t, s): planned(subject, device, t, s) for t in TEXTS for s in SHARES}
    for serve, *_ in served.values():
        for _ in range(2):  # the second copies what frozen plans keep
            serve()
    used: dict[Any, list[float]] = {}
    with progress_bar("requests") as progress:
        for number in range(count):
            which = rng.choice(TEXTS), rng.choice(SHARES)
            serve, deadline, _ = served[which]
            used.setdefault(which, []).append(watch.seconds([serve]) / deadline)
            progress(number + 1, count)
    every = np.array([share for some in used.values() for share in some])
    same = [share / median(some) for some in used.values() for share in some]
    return {
        "count": count,
        "on time": float(np.mean(every <= 1)),
        "median over deadline": float(np.quantile(every, 0.5)),
        "p99 over deadline": float(np.quantile(every, 0.99)),
        "utilisation": float(np.mean(np.minimum(every, 1))),
        "planned over deadline": median(share for *_, share in served.values()),
        "margin for late ones": device.on(subject.graph).late(subject.graph.dtype_bytes),
        "p99 over median of the same request": float(np.quantile(same, 0.99)),
    }


def planned(
    subject: Subject, device: MeasuredDevice, text_tokens: int, share: float
) -> tuple[Callable[[], None], float, float]:
    """What serves a request, its deadline in seconds, and the share of it that is planned."""
    load, graph = subject.load(text_tokens), subject.graph
    dense = Plan.of(graph)
    base = pricing_for(dense, graph, load, "model", device.on(graph)).cost_of(dense)["latency"]
    options = {"utilities": "prior", "device": device.name, "text_tokens": text_tokens}
    asked = Request(graph.name, f"latency={share * base}s", **options)
    plan = plan_graph(graph, asked).plan
    prompt = subject.prompt(Pass(plan, load, decodes=False))

    @torch.no_grad()
    def serve() -> None:
        with subject.session.under(plan):
            prompt()

    return serve, share * base, plan.cost["latency"]["plan"] / (share * base)


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
                "plans": plans(subjects, devices, options.plans, partial),
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
    names = ("median", "p90", "p95", "bias", "count")
    rows = []
    for precision, found in results.items():
        errors = {"operators": document["operators"][precision], **found["plans"]}
        for what, off in errors.items():
            cells = [f"{off[name]:.3f}" if name in off else "" for name in names[:-1]]
            rows.append([f"{what}, {precision}", *cells, str(off.get("count", ""))])
    table(["predictions are off", *names], rows)
    for precision, found in results.items():
        print()
        figures = found["requests"]
        table([f"requests, {precision}", ""], [[k, f"{v:.3f}"] for k, v in figures.items()])


if __name__ == "__main__":
    sys.exit(main())
