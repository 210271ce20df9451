"""An audit as one page of HTML: tables and plots, no other files and no scripts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from planner.audit.report import Audit

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

Rows = Sequence[Sequence[str]]


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
        _by_budget(summary["budgets"]),
        _figure(_gap_plot, found),
        _dominated(summary["dominated"]),
    ]
    if "surrogate" in summary:
        parts += [_surrogate(summary["surrogate"]), _figure(_surrogate_plots, found)]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(headers: Sequence[str], rows: Rows) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headers)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _totals(summary: dict[str, Any]) -> str:
    gap, used = summary["gap"], summary["utilisation"]
    rows = [
        ["beyond their limit", str(summary["infeasible"])],
        ["cost or limit not as priced", str(summary["priced_wrong"])],
        ["limit used, mean (by the optimum)", f"{used['mean']:.2%} ({used['optimum']:.2%})"],
        ["optimality gap, mean", f"{gap['mean']:.4%}"],
        ["optimality gap, 95th percentile", f"{gap['p95']:.4%}"],
        ["optimality gap, largest", f"{gap['max']:.4%}"],
        ["labels that are optimal", f"{summary['optimal']:.2%}"],
        ["labels that are dominated", f"{summary['dominated']['share']:.2%}"],
        ["optima proven", f"{summary['proven']:.2%}"],
        ["seconds per label", f"{summary['seconds_per_label']:.4f}"],
    ]
    if "exact" in summary:
        rows.append(["optima that CP-SAT contradicts", str(summary["exact"]["different"])])
    return _table(["all labels", ""], rows)


def _by_budget(budgets: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            f"{row['budget']:g}",
            str(row["labels"]),
            str(row["infeasible"]),
            f"{row['utilisation']['mean']:.2%}",
            f"{row['gap']['mean']:.4%}",
            f"{row['gap']['p95']:.4%}",
            f"{row['gap']['max']:.4%}",
            f"{row['optimal']:.2%}",
        ]
        for row in budgets
    ]
    headers = ["budget", "labels", "infeasible", "used", "gap", "95 %", "largest", "optimal"]
    return _table(headers, rows)


def _dominated(dominated: dict[str, Any]) -> str:
    if not dominated["count"]:
        return "<h2>Dominated labels</h2>\n<p>None: no plan is worth more at no greater cost.</p>"
    rows = [
        [
            row["sample"],
            f"{row['budget']:g}",
            ", ".join(row["without"]) or "-",
            ", ".join(row["with"]) or "-",
            f"{row['utility'][0]:.5f} to {row['utility'][1]:.5f}",
            f"{row['cost'][0]} to {row['cost'][1]}",
        ]
        for row in dominated["examples"]
    ]
    return (
        "<h2>Dominated labels</h2>\n"
        f"<p>{dominated['count']} labels ({dominated['share']:.2%}): another plan is worth more "
        "and costs no more. Those that lose most, with what the better plan leaves off and "
        "switches on instead:</p>\n"
        + _table(["sample", "budget", "off", "on instead", "utility", "cost"], rows)
    )


def _surrogate(surrogate: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['budget']:g}",
            str(row["plans"]),
            f"{row['rank_additive']:.3f}",
            f"{row['rank_pairwise']:.3f}",
            f"{row['error_additive']:.4f}",
            f"{row['error_pairwise']:.4f}",
            *(f"{value:.4f}" for value in row["regret"].values()),
        ]
        for row in surrogate["budgets"]
    ]
    if not rows:
        return ""
    deciders = [f"regret: {who}" for who in surrogate["budgets"][0]["regret"]]
    headers = ["budget", "plans", "rank, additive", "rank, pairwise", "error, additive"]
    return (
        "<h2>The surrogate against the true loss</h2>\n"
        f"<p>On {surrogate['samples']} samples every plan was run. Rank correlation (Spearman) and "
        "mean error compare predicted and true change of the loss over the plans that fill the "
        "budget; regret is the true loss of what was decided less that of the best plan within the "
        "budget. Static is the one plan that is best for these samples together.</p>\n"
        + _table([*headers, "error, pairwise", *deciders], rows)
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
    if not draw(figure, found):
        return ""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _gap_plot(figure: Any, found: Audit) -> bool:
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
    return True


def _surrogate_plots(figure: Any, found: Audit) -> bool:
    rows = found.summary["surrogate"]["budgets"]
    if not rows:
        return False
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
    return True
