"""An audit as one page of HTML (``audit_page.html``): tables and plots, and no other files."""

from __future__ import annotations

import io
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Template
from markupsafe import Markup

from planner.audit.report import BUDGET_COLUMNS, Audit

_INK, _WARM, _GREY = "#1f5fa8", "#d9822b", "#8a8a8a"
# Most points of a scatter plot: more only make the file heavy.
_POINTS = 4000


def page(found: Audit) -> str:
    """The audit as HTML; without matplotlib, the tables alone."""
    form = files("planner.audit").joinpath("audit_page.html").read_text(encoding="utf-8")
    facts: dict[str, Any] = {"summary": found.summary, "gaps": _figure(_gap_plot, found)}
    if found.summary.get("surrogate", {}).get("budgets"):
        facts["surrogate_columns"] = found.surrogate_columns
        facts["surrogates"] = _figure(_surrogate_plots, found)
    template = Template(form, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    tables = {"budget_columns": BUDGET_COLUMNS, "budgets": found.budget_rows}
    text: str = template.render(facts | tables)
    return text


def _figure(draw: Any, found: Audit) -> Markup:
    """A plot as inline SVG; nothing where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return Markup()
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    draw(figure, found)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return Markup(text[text.index("<svg") :])


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
