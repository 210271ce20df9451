"""The table of architectures: checked one by one, each in processes of its own, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from planner.contained import contained
from planner.documents import read_json
from planner.files import MEBIBYTE, check_output, read_text, write_text
from planner.ir.errors import InputError
from planner.models.checking.architecture import CHECKS, Checked, lowered_row, run_row
from planner.models.checking.model_types import TEXT_TYPES, image_text_types

SECONDS = 600.0

_TITLE = "# Architectures"


def checked(model_type: str) -> Checked:
    """The row of one architecture; a check that does not end or runs out of memory is ended."""
    row = Checked(model_type, dict.fromkeys(CHECKS, ""))
    for what, check in (("lowering", lowered_row), ("running", run_row)):

        def make(check: Callable[[str], Checked] = check) -> str:
            torch.set_num_threads(1)
            return json.dumps(asdict(check(model_type)))

        try:
            found = Checked(**json.loads(contained(make, f"{what} {model_type}", SECONDS)))
        except InputError as error:
            row.remarks.append(str(error))
            continue
        row.answers |= found.answers
        row.sites = row.sites or found.sites
        row.remarks += [remark for remark in found.remarks if remark not in row.remarks]
    return row


def check_types(
    only: Sequence[str], output: Path | None, progress: Callable[[int, int, str], None]
) -> list[Checked]:
    """Check architectures, and keep a table of them.

    Args:
        only: model types; all where there are none.
        output: a Markdown file. The rows lie beside it as JSON, and are checked again only where
            `only` names them, or other versions of libraries are installed.
        progress: told before each check: how many are done, of how many, and what is next.

    Raises InputError: for a model type that is not in the table, and for an output that cannot be
    written, or holds something else.
    """
    known = (*image_text_types(), *TEXT_TYPES)
    unknown = sorted(set(only) - set(known))
    if unknown:
        raise InputError(f"no model type '{unknown[0]}' is among the {len(known)} that are checked")
    rows: dict[str, Checked] = {}
    if output is not None:
        check_output(output, ".md")
        if output.exists() and not read_text(output, "table", MEBIBYTE).startswith(_TITLE):
            raise InputError(f"'{output}' is another file: name one that is not there, or a table")
        rows = _kept(output)
    chosen = [name for name in known if (name in only if only else name not in rows)]
    for done, name in enumerate(chosen):
        progress(done, len(chosen), name)
        rows[name] = checked(name)
        if output is not None:
            _keep(output, [rows[name] for name in known if name in rows])
    return [rows[name] for name in known if name in rows and (not only or name in only)]


def summary(rows: Iterable[Checked]) -> dict[str, int]:
    """How many rows pass each check, and how many have sites; `rows` counts them all."""
    rows = list(rows)
    counts = {"rows": len(rows)}
    for check in CHECKS:
        passed = ("yes", "small") if check == "lowered" else ("yes",)
        counts[check] = sum(row.answers[check] in passed for row in rows)
    counts["sites"] = sum(bool(sum(row.sites.values())) for row in rows)
    return counts


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


def _kept(output: Path) -> dict[str, Checked]:
    path = output.with_suffix(".json")
    if not path.exists():
        return {}
    kept = read_json(path, "table of architectures")
    try:
        if kept["versions"] != _versions():
            return {}
        return {row["model_type"]: Checked(**row) for row in kept["rows"]}
    except (KeyError, TypeError):
        raise InputError(f"'{path}' is not a table of architectures of planner") from None


def _keep(output: Path, rows: Sequence[Checked]) -> None:
    kept = {"versions": _versions(), "rows": [asdict(row) for row in rows]}
    write_text(output.with_suffix(".json"), json.dumps(kept, indent=1) + "\n")
    write_text(output, _markdown(rows))


def _markdown(rows: Sequence[Checked]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in _versions().items())
    lines = [
        _TITLE,
        "",
        f"What planner does with the architectures of transformers ({versions}). Written by",
        "",
        "    planner models --check --output docs/architectures.md",
        "",
        "which goes on where it was stopped; `--only TYPE` checks one again. A row comes of two",
        "models: that of the default config, lowered without weights, and one of a few layers and",
        "random weights, which runs a prompt on the CPU, with an image where one is found that it",
        "takes. `stock`: the stock model does not do it either. Empty: not reached.",
        "",
        *(f"- **{check}**: {meaning}." for check, meaning in CHECKS.items()),
        "- **sites**: layers / attention blocks / MLPs that plans can narrow.",
    ]
    parts = (("Image and text", image_text_types()), ("Text", TEXT_TYPES))
    for title, types in parts:
        lines += ["", f"## {title}", "", *_section([r for r in rows if r.model_type in types])]
    return "\n".join(lines) + "\n"


def _section(rows: Sequence[Checked]) -> list[str]:
    counts = summary(rows)
    said = ", ".join(f"{check} {counts[check]}" for check in CHECKS)
    lines = [
        f"Of {counts['rows']} checked: {said}.",
        "",
        "| model type | sites | " + " | ".join(CHECKS) + " | remarks |",
        "|---|---|" + "---|" * len(CHECKS) + "---|",
    ]
    for row in rows:
        remarks = "; ".join(remark[:160] for remark in row.remarks).replace("|", "\\|")
        cells = [row.model_type, sites_of(row), *(row.answers[check] for check in CHECKS), remarks]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def sites_of(row: Checked) -> str:
    """Counts of its sites, by kind."""
    return " / ".join(str(row.sites.get(kind, 0)) for kind in ("layer", "heads", "mlp"))
