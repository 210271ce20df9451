"""An audit as one page of HTML: tables and plots, no other files and no scripts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from planner.audit.report import BUDGET_COLUMNS, Audit

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #888; }
p { max-width: 46rem; } svg { max-width: 100%; height: auto; } .bad { color: #b00020; }
"""
_INK, _WARM, _GREY = "#1f5fa8", "#d9822b", "#8a8a8a"
# Most points of a scatter plot: more only make the file heavy.
_POINTS = 4000


def page(found: Audit) -> str:
    """The audit as HTML; without matplotlib, the tables alone."""
    summary = found.summary
    title = f"Audit of {summary['labels']} labels for {summary['model']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{summary['samples']} samples, switches {escape(summary['switches'])}, plans from "
        f"{escape(summary['source'])}. Utilities and losses are in nats per answer token.</p>",
        _totals(summary),
        "<h2>By budget</h2>",
        _table(BUDGET_COLUMNS, found.budget_rows),
        _figure(_gap_plot, found),
        _dominated(summary["dominated"]),
    ]
    if summary.get("surrogate", {}).get("budgets"):
        parts += [_surrogate(found), _figure(_surrogate_plots, found)]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Records as a table: column -> how a record fills it."""

    def line(row: Mapping[str, Any]) -> str:
        cells = [f"<td>{escape(form.format_map(row))}</td>" for form in columns.values()]
        return f"<tr>{''.join(cells)}</tr>"

    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "\n".join(map(line, rows))
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _totals(summary: dict[str, Any]) -> str:
    """What the table by budget does not say."""
    forms = {
        "cost or limit not as priced": "{priced_wrong}",
        "limit used by the optimum, mean": "{utilisation[optimum]:.2%}",
        "labels that are dominated": "{dominated[share]:.2%}",
        "seconds per label": "{seconds_per_label:.4f}",
    }
    if "exact" in summary:
        forms["optima that CP-SAT contradicts"] = "{exact[different]}"
    rows = [{"what": what, "figure": form.format_map(summary)} for what, form in forms.items()]
    return _table({"all labels": "{what}", "": "{figure}"}, rows)


def _dominated(dominated: dict[str, Any]) -> str:
    if not dominated["count"]:
        return "<h2>Dominated labels</h2>\n<p>None: no plan is worth more at no greater cost.</p>"
    rows = [
        row | {"off": ", ".join(row["without"]) or "-", "on": ", ".join(row["with"]) or "-"}
        for row in dominated["examples"]
    ]
    columns = {
        "sample": "{sample}",
        "budget": "{budget:g}",
        "off": "{off}",
        "on instead": "{on}",
        "utility": "{utility[0]:.5f} to {utility[1]:.5f}",
        "cost": "{cost[0]} to {cost[1]}",
    }
    return (
        "<h2>Dominated labels</h2>\n"
        f"<p>{dominated['count']} labels ({dominated['share']:.2%}): another plan is worth more "
        "and costs no more. Those that lose most, with what the better plan leaves off and "
        f"switches on instead:</p>\n{_table(columns, rows)}"
    )


def _surrogate(found: Audit) -> str:
    surrogate = found.summary["surrogate"]
    return (
        "<h2>The surrogate against the true loss</h2>\n"
        f"<p>On {surrogate['samples']} samples every plan was run. Rank correlation (Spearman) and "
        "mean error compare predicted and true change of the loss over the plans that fill the "
        "budget. The other columns are regret, by who decides: the true loss of what was decided "
        "less that of the best plan within the budget. Static is the one plan that is best for "
        "these samples together.</p>\n"
        f"{_table(found.surrogate_columns, surrogate['budgets'])}"
    )


def _figure(draw: Any, found: Audit) -> str:
    """A plot as inline SVG; nothing where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    draw(figure, found)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _gap_plot(figure: Any, found: Audit) -> None:
    gaps, used = figure.subplots(1, 2)
    for index, budget in enumerate(sorted(set(found.labels.budgets.tolist()))):
        here = [v for v, b in zip(found.verdicts, found.labels.budgets.tolist()) if b == budget]
        values = np.sort([v.gap for v in here])
        share = np.arange(1, len(values) + 1) / len(values)
        gaps.step(values, share, where="post", label=f"{budget:g}", color=f"C{index}")
    largest = max([1e-3, *(v.gap for v in found.verdicts)])
    gaps.set(xlabel="optimality gap", ylabel="share of labels")
    gaps.set(xlim=(-0.02 * largest, 1.02 * largest), ylim=(0, 1.02))
    gaps.legend(title="budget", fontsize="small")
    shares = [v.utilisation for v in found.verdicts]
    used.hist(shares, bins=np.linspace(0, max([1.0, *shares]), 41), color=_INK)
    used.axvline(1, color=_WARM, linewidth=1)
    used.set(xlabel="cost over limit", ylabel="labels")


def _surrogate_plots(figure: Any, found: Audit) -> None:
    rows = found.summary["surrogate"]["budgets"]
    scatter, bars = figure.subplots(1, 2)
    true = np.concatenate([s.losses for s in found.surrogates])
    every = -(-len(true) // _POINTS)
    for name, color in (("additive", _INK), ("pairwise", _WARM)):
        predicted = np.concatenate([getattr(s, name) for s in found.surrogates])
        scatter.plot(
            true[::every], predicted[::every], ".", markersize=2, color=color, label=name, alpha=0.5
        )
    ends = [min(true.min(), 0.0), true.max()]
    scatter.plot(ends, ends, color=_GREY, linewidth=1)
    scatter.set(xlabel="true change of the loss", ylabel="predicted")
    scatter.legend(markerscale=4, fontsize="small")
    deciders = list(rows[0]["regret"])
    width = 0.8 / len(deciders)
    for index, who in enumerate(deciders):
        places = np.arange(len(rows)) + (index - (len(deciders) - 1) / 2) * width
        bars.bar(places, [row["regret"][who] for row in rows], width, label=who, color=f"C{index}")
    bars.set_xticks(range(len(rows)), [f"{row['budget']:g}" for row in rows])
    bars.set(xlabel="budget", ylabel="mean regret")
    bars.legend(fontsize="small")
