"""Results as a page: JSON, tables in Markdown, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.files import write_bytes, write_text

__all__ = ["write_page"]

Rows = Sequence[Mapping[str, Any]]


def write_page(results: Mapping[str, Any], folder: Path) -> None:
    """Write NAME.json, NAME.md and NAME.svg."""
    name = results["experiment"]
    write_text(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / f"{name}.md", markdown(results))
    write_bytes(folder / f"{name}.svg", plot(results["summary"]))


def markdown(results: Mapping[str, Any]) -> str:
    """The table, and how it was made."""
    rows: Rows = results["summary"]
    families = list(rows[0]["families"])
    adherence = results["experiment"] == "table3"
    extra = ["success", "utilisation"] if adherence else []
    headers = ["method", "tokens", "budget", "FLOPs", "accuracy", *extra, *families]
    lines = [
        f"# {results['title']}",
        "",
        f"{len(results['seeds'])} training runs, {results['samples']} test questions each; "
        "accuracy as mean ± standard deviation over runs, families as means, in percent. FLOPs are "
        "of the language model's prefill, over the base model's.",
        "",
        "| " + " | ".join(headers) + " |",
        "|" + "---|" * len(headers),
    ]
    for row in rows:
        cells = [
            row["method"],
            f"`{row['tokens']}`" if row["tokens"] else "all",
            f"{row['budget']:.0%}",
            f"{row['cost_fraction']:.1%}",
            f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_spread']:.1f}",
            *(f"{row[measure]:.1%}" for measure in extra),
            *(f"{100 * row['families'][family]:.1f}" for family in families),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    flags = "".join(f" --set {override}" for override in results["overrides"])
    seeds = ",".join(map(str, results["seeds"]))
    lines += [
        "",
        f"![accuracy over FLOPs]({results['experiment']}.svg)",
        "",
        f"    planner experiment {results['experiment']} --seeds {seeds} "
        f"--samples {results['samples']}{flags}",
    ]
    return "\n".join(lines) + "\n"


def plot(rows: Rows) -> bytes:
    """Accuracy over cost, a line for each method and selector; SVG."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        label = row["method"] + (f", {row['tokens'].partition(':')[0]}" if row["tokens"] else "")
        lines.setdefault(label, []).append(row)
    with pyplot.rc_context({"svg.hashsalt": "planner", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
        for label, members in lines.items():
            ordered = sorted(members, key=lambda row: row["cost_fraction"])
            axes.errorbar(
                [row["cost_fraction"] for row in ordered],
                [100 * row["accuracy"] for row in ordered],
                [100 * row["accuracy_spread"] for row in ordered],
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=1.2,
                label=label,
            )
        axes.set_xlabel("FLOPs of the prefill, language model, fraction of the base model")
        axes.set_ylabel("accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", frameon=False, fontsize=8)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return stream.getvalue()
