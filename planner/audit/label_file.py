"""The file of labels: one row per sample and budget, in Parquet.

Its columns are in docs/audit.md. Plan p of `losses` has switch i on where bit i of p is 1. The
schema's metadata holds a JSON object under the key ``planner_labels``: format, terms (`Terms`) and
the names of the switches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planner.files import MEBIBYTE, read_bytes, write_bytes
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.planning.compiler import pose
from planner.planning.request import Request
from planner.planning.switches import SwitchSet
from planner.solver.problem import Flags, Floats, Ints, Problem

FORMAT = 1
_MOST_BYTES = 256 * MEBIBYTE
_MOST_VALUES = 20_000_000
_KEY = b"planner_labels"
_COLUMNS = ("sample", "budget", "utilities", "plan", "cost", "limit", "losses")


@dataclass(frozen=True)
class Terms:
    """What labels of a file have in common.

    `switches` are ``adallava-l``, counted as in the paper, or some of layers, heads and mlp joined
    by commas, priced in FLOPs of the prefill of so many tokens.
    """

    model: str  # what the user called it
    fingerprint: str  # of its Graph
    switches: str
    source: str  # what made the plans, ``heuristic`` or the scheduler's name
    image_tokens: int
    text_tokens: int
    mlp_groups: int | None = None  # groups an MLP is divided into; None for the usual number

    def problem(self, graph: Graph, budget: float) -> Problem:
        """The problem that a fraction of the base model poses; its utilities are no label's.

        InputError where the graph is another model's, or labels cannot be had for such switches.
        """
        if self.fingerprint != graph.properties["fingerprint"]:
            raise InputError(
                f"the labels are for '{self.model}' ({self.fingerprint}), not for '{graph.name}' "
                f"({graph.properties['fingerprint']})"
            )
        switches = SwitchSet.parse(self.switches)
        if "tokens" in switches.axes or switches.like_heads:
            raise InputError(
                f"there are no labels for the switches {self.switches}: choose adallava-l, or some "
                "of layers,heads,mlp"
            )
        request = Request(
            self.model, budget, self.switches, utilities="uniform", scope="model",
            image_tokens=self.image_tokens, text_tokens=self.text_tokens, new_tokens=0,
            mlp_groups=self.mlp_groups,
        )  # fmt: skip
        return pose(graph, request)[2]


@dataclass(frozen=True, eq=False)
class Labels:
    """All labels of a file."""

    terms: Terms
    switches: tuple[str, ...]  # names, see `planner.solver.problem.Problem.switch_names`
    samples: tuple[str, ...]  # one per label
    budgets: Floats  # (labels,)
    utilities: Floats  # (labels, switches)
    plans: Flags  # (labels, switches)
    costs: Ints  # (labels,)
    limits: Ints  # (labels,)
    losses: dict[int, Floats]  # label -> (2 ^ switches,), where they were measured

    def __len__(self) -> int:
        return len(self.samples)

    def some(self, rows: Sequence[int]) -> Labels:
        """These of the labels, by index."""
        return replace(
            self,
            samples=tuple(self.samples[row] for row in rows),
            budgets=self.budgets[list(rows)],
            utilities=self.utilities[list(rows)],
            plans=self.plans[list(rows)],
            costs=self.costs[list(rows)],
            limits=self.limits[list(rows)],
            losses={new: self.losses[old] for new, old in enumerate(rows) if old in self.losses},
        )

    def problems(self, graph: Graph) -> dict[float, Problem]:
        """Budget -> its problem, priced afresh; its utilities are no label's.

        InputError where the graph is another model's, or the switches are not those of the file.
        """
        found = {b: self.terms.problem(graph, b) for b in sorted(set(self.budgets.tolist()))}
        for problem in found.values():
            if problem.switch_names != self.switches:
                raise InputError(
                    f"the labels have {len(self.switches)} switches, which are not those of "
                    f"'{graph.name}' under {self.terms.switches}"
                )
        return found


def require_arrow() -> Any:
    """pyarrow, which reads and writes labels; InputError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("labels need pyarrow: pip install 'planner[train]'") from None
    return pyarrow


def write_labels(path: Path, labels: Labels) -> None:
    """Write a file of labels, whole or not at all."""
    arrow = require_arrow()
    header = {"format": FORMAT, "terms": asdict(labels.terms), "switches": labels.switches}
    losses = [labels.losses.get(index) for index in range(len(labels))]
    columns: dict[str, Any] = {
        "sample": arrow.array(labels.samples, arrow.string()),
        "budget": arrow.array(labels.budgets),
        "utilities": arrow.array(list(labels.utilities), arrow.list_(arrow.float64())),
        "plan": arrow.array(labels.plans.tolist(), arrow.list_(arrow.bool_())),
        "cost": arrow.array(labels.costs),
        "limit": arrow.array(labels.limits),
        "losses": arrow.array(losses, arrow.list_(arrow.float64())),
    }
    table = arrow.table(columns).replace_schema_metadata({_KEY: json.dumps(header).encode()})
    stream = arrow.BufferOutputStream()
    arrow.parquet.write_table(table, stream, compression="zstd")
    write_bytes(path, stream.getvalue().to_pybytes())


def read_labels(path: Path) -> Labels:
    """Read and check a file of labels; every fault is one sentence in an InputError."""
    arrow = require_arrow()
    contents = arrow.py_buffer(read_bytes(path, "file of labels", _MOST_BYTES))
    try:
        facts = arrow.parquet.read_metadata(arrow.BufferReader(contents))
        groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
        columns = [g.column(number) for g in groups for number in range(g.num_columns)]
        values = sum(column.num_values for column in columns)
        # A few bytes can stand for any number of equal values.
        if max(values, facts.num_rows) > _MOST_VALUES:
            raise InputError(f"the labels '{path}' have more than {_MOST_VALUES} values")
        table = arrow.parquet.read_table(arrow.BufferReader(contents))
    except (OSError, arrow.ArrowException):
        raise InputError(f"'{path}' is truncated or not a Parquet file") from None
    header = _header(table, path)
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise InputError(f"the labels '{path}' have no column '{missing[0]}'")
    try:
        labels = _labels(header, {name: table.column(name).to_pylist() for name in _COLUMNS})
    except (TypeError, ValueError, KeyError, OverflowError):
        raise InputError(
            f"the labels '{path}' are broken: a column is not as it should be"
        ) from None
    _check(labels, path)
    return labels


def _header(table: Any, path: Path) -> dict[str, Any]:
    text = (table.schema.metadata or {}).get(_KEY)
    try:
        header: dict[str, Any] = dict(json.loads(text or "null"))
    except (TypeError, ValueError):
        raise InputError(f"'{path}' is a Parquet file, but not one of labels") from None
    if header.get("format") != FORMAT:
        raise InputError(
            f"the labels '{path}' have format {header.get('format')}, this planner reads {FORMAT}"
        )
    return header


def _labels(header: dict[str, Any], columns: dict[str, Sequence[Any]]) -> Labels:
    switches = tuple(header["switches"])
    rows = len(columns["sample"])
    return Labels(
        terms=Terms(**header["terms"]),
        switches=switches,
        samples=tuple(str(name) for name in columns["sample"]),
        budgets=np.array(columns["budget"], dtype=np.float64),
        utilities=np.array(columns["utilities"], dtype=np.float64).reshape(rows, len(switches)),
        plans=np.array(columns["plan"], dtype=np.bool_).reshape(rows, len(switches)),
        costs=np.array(columns["cost"], dtype=np.int64),
        limits=np.array(columns["limit"], dtype=np.int64),
        losses={
            index: np.array(values, dtype=np.float64).reshape(1 << len(switches))
            for index, values in enumerate(columns["losses"])
            if values is not None
        },
    )


def _check(labels: Labels, path: Path) -> None:
    if not len(labels):
        raise InputError(f"the labels '{path}' are empty")
    if not ((labels.budgets > 0) & (labels.budgets <= 1)).all():
        raise InputError(f"a budget in '{path}' is not more than 0 and at most 1")
    for values in (labels.utilities, *labels.losses.values()):
        if not np.isfinite(values).all():
            raise InputError(f"a utility or loss in '{path}' is not a finite number")
