"""What commands print: tables, progress, and one JSON document."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from planner.progress import Progress, Say, progress_bar

_SHOW_AFTER_SECONDS = 2.0


@dataclass(frozen=True)
class Console:
    """How much a command prints, and as what; the options that every command has."""

    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, nothing else.")
    ] = False
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print more.")] = False

    def show(self, document: Any, text: Callable[[], None]) -> None:
        """What came out: as JSON, or else in words unless the user wants to see nothing."""
        if self.as_json:
            print_json(document)
        elif not self.quiet:
            text()

    @property
    def shows_progress(self) -> bool:
        """Whether what is being done may be said on stderr."""
        return not (self.quiet or self.as_json)

    @contextmanager
    def status(self) -> Iterator[Say]:
        """Say on stderr what is being done once it takes longer than two seconds.

        Yields a function that takes the name of the stage, "" once there is something to see. With
        --verbose every stage is a line.
        """
        current, done = {"stage": ""}, threading.Event()

        def update(stage: str) -> None:
            current["stage"] = stage
            if not stage:
                done.set()
            elif self.shows_progress and self.verbose:
                say(f"planner: {stage}")

        # In a log, a spinner is noise: there, progress is what --verbose says.
        if not self.shows_progress or self.verbose or not sys.stderr.isatty():
            yield update
            return

        def spin() -> None:
            if done.wait(_SHOW_AFTER_SECONDS):
                return
            import rich.console

            with rich.console.Console(stderr=True).status("") as spinner:
                while not done.wait(0.1):
                    spinner.update(f"{current['stage']} ...")

        thread = threading.Thread(target=spin, daemon=True)
        thread.start()
        try:
            yield update
        finally:
            done.set()
            thread.join(timeout=1)

    def progress_bar(self, what: str) -> AbstractContextManager[Progress]:
        """A progress bar on stderr; yields a function of what is done and of all there is."""
        return progress_bar(what, self.shows_progress)


def print_json(document: Any) -> None:
    """One JSON document on stdout; what is not a number becomes null."""
    print(json.dumps(_clean(document), indent=2))


def _clean(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    return value


def say(text: str) -> None:
    """One line for people, on stderr, so that stdout stays for results."""
    print(text, file=sys.stderr)


_SCALES = {
    "flops": ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1, "FLOP")),
    "latency": ((1, "s"), (1e-3, "ms"), (1e-6, "us"), (0, "us")),
    "bytes": ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")),
    "count": ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")),
}


def amount(value: float, metric: str) -> str:
    """A number with a unit that people read: ``5.79 TFLOP``, ``18.3 ms``, ``352 MiB``."""
    scales = _SCALES.get(
        "bytes" if metric in ("kv", "memory", "bytes") else metric, _SCALES["count"]
    )
    for scale, unit in scales:
        if scale and value >= scale:
            return f"{value / scale:.4g} {unit}".strip()
    last, unit = scales[-1]
    return f"{value / (last or 1e-6):.4g} {unit}".strip()


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout: text left, numbers right."""
    widths = [max(len(r[i]) for r in [headers, *rows]) for i in range(len(headers))]
    numeric = [all(_is_number(r[i]) for r in rows) and bool(rows) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(cells, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    if title:
        print(title)
    print(line(headers))
    print("  ".join("-" * w for w in widths))
    for row in rows:
        print(line(row))


def print_records(
    columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]], title: str = ""
) -> None:
    """A table of records: column -> how a record fills it, such as ``{gap[mean]:.2%}``."""
    cells = [[form.format_map(row) for form in columns.values()] for row in rows]
    table(list(columns), cells, title)


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit() or text[0] in "+-." or text == "-"
