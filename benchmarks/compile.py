"""How long `planner compile` takes, stage by stage, cold and with the lowered graph cached.

    python benchmarks/compile.py [--repeats 3] [--json]

Every run is a process of its own. A cold run has an empty cache folder; the cached run after it has
the same one. Kinds of run take turns, so that a busy minute does not fall on one of them alone, and
medians are reported. Nothing is reported if any two runs wrote a different plan or graph, or if a
run lowered the model where it should have found it, or the other way round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from planner.cli.console import print_json, table

# What each kind of run should stay under on two cores.
TARGET_SECONDS = {"cold": 25.0, "cached": 3.0, "help": 0.5}
TARGET_PEAK_BYTES = 3e9
OUTPUTS = ("plan.yaml", "graph.txt")


class Invalid(Exception):
    """The runs are not what they should be, so their figures mean nothing."""


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        seconds: wall clock, from start to exit.
        peak_bytes: largest resident set.
        stages: seconds by stage, as the command itself reports them.
    """

    seconds: float
    peak_bytes: int
    stages: dict[str, float]


def execute(command: Sequence[str], cache: Path) -> tuple[Run, str]:
    """Run a command; (what it took, its stdout)."""
    environment = {**os.environ, "PLANNER_CACHE": str(cache), "PLANNER_DEBUG": ""}
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output)
        # Unlike getrusage, wait4 tells the peak of this child alone.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        output.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return Run(seconds, usage.ru_maxrss * unit, {}), output.read()


def compile_once(model: str, budget: str, cache: Path, folder: Path, cached: bool) -> Run:
    """One `planner compile`, with its stages; the rest of the time is start and writing."""
    command = [sys.executable, "-m", "planner", "compile", "--model", model, "--budget", budget]
    run, output = execute([*command, "-o", str(folder), "--json"], cache)
    document = json.loads(output)
    if document["from_cache"] != cached:
        done = "found the graph in the cache" if document["from_cache"] else "lowered the model"
        raise Invalid(f"the run '{folder.name}' {done}")
    stages: dict[str, float] = document["seconds"]
    rest = run.seconds - sum(stages.values())
    return Run(run.seconds, run.peak_bytes, {**stages, "start, write": rest})


def check_same(folders: Sequence[Path]) -> None:
    """Raise Invalid unless all folders hold the same outputs, to the byte."""
    first = folders[0]
    for name in OUTPUTS:
        expected = (first / name).read_bytes()
        for folder in folders[1:]:
            if (folder / name).read_bytes() != expected:
                raise Invalid(f"{name} differs between the runs '{first.name}' and '{folder.name}'")


def measure(model: str, budget: str, repeats: int) -> dict[str, list[Run]]:
    """Runs by kind."""
    runs: dict[str, list[Run]] = {kind: [] for kind in TARGET_SECONDS}
    with tempfile.TemporaryDirectory() as name:
        folders = []
        for turn in range(repeats):
            cache = Path(name) / f"cache-{turn}"
            for kind in ("cold", "cached"):
                folders.append(Path(name) / f"{kind}-{turn}")
                once = compile_once(model, budget, cache, folders[-1], cached=kind == "cached")
                runs[kind].append(once)
            runs["help"].append(execute([sys.executable, "-m", "planner", "--help"], cache)[0])
        check_same(folders)
    return runs


def summary(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Medians, peaks and targets by kind of run."""
    return {
        kind: {
            "seconds": median(run.seconds for run in members),
            "target_seconds": TARGET_SECONDS[kind],
            "all_seconds": [run.seconds for run in members],
            "peak_bytes": max(run.peak_bytes for run in members),
            "target_peak_bytes": TARGET_PEAK_BYTES,
            "stages": {
                stage: median(run.stages[stage] for run in members) for stage in members[0].stages
            },
        }
        for kind, members in runs.items()
    }


def print_summary(found: dict[str, Any]) -> None:
    stages = found["cold"]["stages"]
    rows = [
        [stage, f"{stages[stage]:.2f}", f"{found['cached']['stages'][stage]:.2f}"]
        for stage in stages
    ]
    table(["stage, seconds", "cold", "cached"], rows)
    print()
    rows = [
        [
            kind,
            f"{facts['seconds']:.2f}",
            f"{facts['target_seconds']:g}",
            f"{facts['peak_bytes'] / 1e9:.2f}",
            f"{facts['target_peak_bytes'] / 1e9:g}",
        ]
        for kind, facts in found.items()
    ]
    table(["run", "seconds", "target", "peak GB", "target"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llava-7b")
    parser.add_argument("--budget", default="0.65")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    try:
        found = summary(measure(options.model, options.budget, max(1, options.repeats)))
    except (Invalid, subprocess.CalledProcessError) as reason:
        print(f"no figures: {reason}", file=sys.stderr)
        return 1
    if options.json:
        print_json({"model": options.model, "budget": options.budget, "runs": found})
    else:
        print_summary(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
