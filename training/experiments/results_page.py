"""Results as a page: JSON, tables in Markdown, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.files import write_bytes, write_text
from planner.training.experiments.learning import WINDOW

Rows = Sequence[Mapping[str, Any]]
_HOW_COMPARED = (
    " Differences from the base model, in percentage points, are by a paired bootstrap over runs "
    "and questions."
)


def write_page(results: Mapping[str, Any], folder: Path) -> None:
    """Write NAME.json, NAME.md and NAME.svg."""
    name = results["experiment"]
    write_text(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / f"{name}.md", markdown(results))
    write_bytes(folder / f"{name}.svg", plot(results["summary"], results.get("learned", ())))


def markdown(results: Mapping[str, Any]) -> str:
    """The tables, and how they were made."""
    learned: Rows = results.get("learned", ())
    flags = "".join(f" --set {override}" for override in results["overrides"])
    seeds = ",".join(map(str, results["seeds"]))
    lines = [
        f"# {results['title']}",
        "",
        f"{len(results['seeds'])} training runs, {results['samples']} test questions each; "
        "accuracy as mean ± standard deviation over runs, families as means, in percent. FLOPs are "
        "of the language model's prefill, over the base model's."
        + _HOW_COMPARED
        * any("against_base" in row for row in results["summary"]),
        "",
        *_accuracies(results["summary"], adherence=results["experiment"] == "table3"),
        "",
        *([*_losses(learned), "", *_regrets(learned), ""] if learned else []),
        f"![accuracy over FLOPs]({results['experiment']}.svg)",
        "",
        f"    planner experiment {results['experiment']} --seeds {seeds} "
        f"--samples {results['samples']}{flags}",
    ]
    return "\n".join(lines) + "\n"


def _accuracies(rows: Rows, adherence: bool) -> list[str]:
    families = list(rows[0]["families"])
    extra = ["success", "utilisation"] if adherence else []
    intervals = any("against_base" in row for row in rows)
    cells = [
        [
            row["method"],
            f"`{row['tokens']}`" if row["tokens"] else "all",
            f"{row['budget']:.0%}",
            f"{row['cost_fraction']:.1%}",
            f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_spread']:.1f}",
            *([_interval(row.get("against_base"))] if intervals else []),
            *(f"{row[measure]:.1%}" for measure in extra),
            *(f"{100 * row['families'][family]:.1f}" for family in families),
        ]
        for row in rows
    ]
    shown = ["accuracy", "- base, 95 %"] if intervals else ["accuracy"]
    return table(["method", "tokens", "budget", "FLOPs", *shown, *extra, *families], cells)


def _interval(found: Mapping[str, float] | None) -> str:
    """A difference in percentage points, and the interval that it is in."""
    if found is None:
        return ""
    low, high = (f"{100 * found[end]:+.1f}" for end in ("low", "high"))
    return f"{100 * found['difference']:+.1f} ({low} to {high})"


def _losses(rows: Rows) -> list[str]:
    steps = sorted({last for row in rows for last, _ in row["loss"]})
    cells = [
        [row["method"], *(f"{dict(row['loss'])[s]:.4f}" for s in steps)]
        for row in rows
        if len(row["loss"]) == len(steps)
    ]
    return [
        "Loss of the joint training in nats per answer token, by steps, means over runs:",
        "",
        *table(["method", *(f"{last - WINDOW + 1}-{last}" for last in steps)], cells),
    ]


def _regrets(rows: Rows) -> list[str]:
    who = ("label", "solver", "static", "random")
    cells = [
        [row["method"], f"{entry['budget']:.0%}", *(f"{entry[name]:.4f}" for name in who)]
        for row in rows
        for entry in row["regret"]
    ]
    return [
        "Regret in nats per answer token on validation questions, means over runs: the loss under "
        "a plan less that under the best plan within the budget, on the same trained model. "
        "*label* is the scheduler's plan, *solver* the best by measured utilities, *static* the "
        "one that is best for all questions together, *random* the mean over plans that use the "
        "budget.",
        "",
        *table(["method", "budget", *who], cells),
    ]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, line by line."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def plot(rows: Rows, learned: Rows = ()) -> bytes:
    """Accuracy over cost, a line for each method and selector, and losses beside it; SVG."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "planner", "font.size": 9}):
        panels = 2 if learned else 1
        figure, axes = pyplot.subplots(
            1, panels, figsize=(7.5 + 3 * (panels - 1), 4.5), layout="constrained", squeeze=False
        )
        _plot_accuracies(axes[0, 0], rows)
        if learned:
            _plot_losses(axes[0, 1], learned)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return stream.getvalue()


def _plot_accuracies(axes: Any, rows: Rows) -> None:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        label = row["method"] + (f", {row['tokens'].partition(':')[0]}" if row["tokens"] else "")
        lines.setdefault(label, []).append(row)
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


def _plot_losses(axes: Any, rows: Rows) -> None:
    for row in rows:
        if len(row["loss"]) > 1:
            steps, losses = zip(*row["loss"], strict=True)
            axes.plot(steps, losses, marker="o", markersize=4, linewidth=1.2, label=row["method"])
    axes.set_xlabel(f"step, means of {WINDOW}")
    axes.set_ylabel("loss of the joint training, nats per answer token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
