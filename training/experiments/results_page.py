"""What pages of results are made of: tables in Markdown, and pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, line by line."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


@contextmanager
def figure_as_svg(size: tuple[float, float], font_size: int) -> Iterator[tuple[Any, io.BytesIO]]:
    """A figure of matplotlib to draw in, width and height in inches; then it is there as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = io.BytesIO()
    with pyplot.rc_context({"svg.hashsalt": "planner", "font.size": font_size}):
        figure = pyplot.figure(figsize=size, layout="constrained")
        yield figure, drawn
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def plot(rows: Rows, learned: Rows = (), window: int = 0) -> bytes:
    """Accuracy over cost, a line for each method and selector, and losses beside it; SVG.

    Losses are means of so many steps.
    """
    panels = 2 if learned else 1
    with figure_as_svg((7.5 + 3 * (panels - 1), 4.5), font_size=9) as (figure, drawn):
        axes = figure.subplots(1, panels, squeeze=False)
        _plot_accuracies(axes[0, 0], rows)
        if learned:
            _plot_losses(axes[0, 1], learned, window)
    return drawn.getvalue()


def _plot_accuracies(axes: Any, rows: Rows) -> None:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        label = row["method"] + (f", {row['tokens'].partition(':')[0]}" if row["tokens"] else "")
        lines.setdefault(label, []).append(row)
    for number, (label, members) in enumerate(lines.items()):
        ordered = sorted(members, key=lambda row: row["cost_fraction"])
        axes.errorbar(
            [row["cost_fraction"] for row in ordered],
            [100 * row["accuracy"] for row in ordered],
            [100 * row["accuracy_spread"] for row in ordered],
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.2,
            # There are ten colours.
            linestyle=["-", "--", ":"][number // 10 % 3],
            label=label,
        )
    axes.set_xlabel("FLOPs of the prefill, language model, fraction of the base model")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    if lines:
        # Beside the lines, where they leave no room.
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(lines) > 6 else {}
        axes.legend(**{"loc": "lower right", "frameon": False, "fontsize": 8} | place)


def _plot_losses(axes: Any, rows: Rows, window: int) -> None:
    for row in rows:
        if len(row["loss"]) > 1:
            steps, losses = zip(*row["loss"], strict=True)
            axes.plot(steps, losses, marker="o", markersize=4, linewidth=1.2, label=row["method"])
    axes.set_xlabel(f"step, means of {window}")
    axes.set_ylabel("loss of the joint training, nats per answer token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
