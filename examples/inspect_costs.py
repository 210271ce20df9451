"""The roofline of every operator of a model on two devices, in the prefill and in a decode step.

    python examples/inspect_costs.py --model llava-7b --devices v100 h200 -o roofline.png

Prints where the time goes and saves a log-log plot: arithmetic intensity (FLOPs for each byte
moved) against the attainable FLOP/s, under each device's roof. All figures are modelled.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from planner.ir.cost import Cost, Workload, price, total
from planner.ir.cost.device_table import Device, device
from planner.ir.graph import Graph, Operator
from planner.planning.catalog import find_model
from planner.planning.graph_cache import lowered_graph

# Groups of operators, in the order of the model, and their colours.
COLOURS = {
    "vision encoder": "#56b4e9",
    "vision attention": "#0072b2",
    "projector": "#cc79a7",
    "decoder linear": "#e69f00",
    "decoder attention": "#d55e00",
    "lm_head": "#009e73",
    "without FLOPs": "#aaaaaa",
}
NO_FLOPS = "without FLOPs"
STYLES = (("o", "-"), ("s", "--"))


@dataclass(frozen=True)
class Point:
    """Operators of one group whose costs are equal.

    Attributes:
        group: a key of `COLOURS`; `NO_FLOPS` are norms, additions and the like.
        cost: of one of them.
        share: of the step's seconds that all of them take together.
    """

    group: str
    cost: Cost
    share: float


@dataclass(frozen=True)
class Step:
    """One step of a model, a prefill or a decode step, on one device."""

    name: str
    is_prefill: bool
    chip: Device
    seconds: float
    points: tuple[Point, ...]

    def share(self, group: str) -> float:
        """Part of the seconds that a group takes."""
        return sum(point.share for point in self.points if point.group == group)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llava-7b", help="alias, local folder or hub id")
    parser.add_argument(
        "--devices", nargs=2, default=["v100", "h200"], help="two of `planner devices`"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("roofline.png"), help="PNG file")
    return parser.parse_args()


def group_of(operator: Operator, cost: Cost) -> str:
    if cost.flops == 0:
        return NO_FLOPS
    if operator.part == "head":
        return "lm_head"
    if operator.part == "decoder":
        return "decoder attention" if operator.kind == "attention" else "decoder linear"
    if operator.part == "vision":
        return "vision attention" if operator.kind == "attention" else "vision encoder"
    return operator.part


def priced(graph: Graph, load: Workload, is_prefill: bool, chip: Device) -> Step:
    """Price every operator; those that cost the same become one point."""
    sizes = load.prefill() if is_prefill else load.decode(load.new_tokens)
    name = f"prefill of {load.prompt_tokens}" if is_prefill else f"decode step {load.new_tokens}"
    costs = [(operator, price(operator, graph, sizes, chip)) for operator in graph]
    seconds = total(cost for _, cost in costs).seconds
    alike = Counter((group_of(operator, cost), cost) for operator, cost in costs if cost.seconds)
    found = (
        Point(group, cost, count * cost.seconds / seconds) for (group, cost), count in alike.items()
    )
    return Step(name, is_prefill, chip, seconds, tuple(found))


def report(step: Step) -> None:
    print(f"\n{step.name} on {step.chip.name}: {step.seconds * 1e3:.4g} ms")
    for group in COLOURS:
        bounds = {point.cost.bound for point in step.points if point.group == group}
        if bounds:
            bound = " or ".join(sorted(bounds))
            print(f"  {group:<18} {step.share(group):6.1%} of the time, bound by {bound}")


def draw_roofs(axes: Axes, steps: Sequence[Step]) -> None:
    """Every point lies on its device's roof; areas are shares of the step's time."""
    for chip, (_, line) in styled(steps).items():
        ridge = chip.operations_per_second / chip.bytes_per_second
        top = chip.operations_per_second
        axes.plot([0.4, ridge, 2500], [0.4 * top / ridge, top, top], line, color="#555555", lw=1.2)
    for step in steps:
        marker = styled(steps)[step.chip][0]
        for point in sorted(step.points, key=lambda point: -point.share):
            if point.group == NO_FLOPS:
                continue
            colour = COLOURS[point.group]
            axes.scatter(
                point.cost.flops / point.cost.bytes,
                point.cost.flops / point.cost.seconds,
                s=24 + 900 * point.share,
                marker=marker,
                facecolor=colour if step.is_prefill else "white",
                edgecolor="white" if step.is_prefill else colour,
                linewidth=0.8 if step.is_prefill else 2,
                zorder=3,
            )
    axes.set(xscale="log", yscale="log", xlim=(0.4, 2500))
    axes.set_xlabel("arithmetic intensity, FLOP per byte moved")
    axes.set_ylabel("attainable FLOP/s")
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def draw_shares(axes: Axes, steps: Sequence[Step]) -> None:
    """One bar a step: where its time goes."""
    for place, step in enumerate(steps):
        left = 0.0
        for group, colour in COLOURS.items():
            axes.barh(place, step.share(group), left=left, color=colour, edgecolor="white")
            left += step.share(group)
    labels = [f"{step.name}\n{step.chip.name}, {step.seconds * 1e3:.3g} ms" for step in steps]
    axes.set_yticks(range(len(steps)), labels)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the time")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)


def styled(steps: Sequence[Step]) -> dict[Device, tuple[str, str]]:
    """Marker and line of each device."""
    return dict(zip(dict.fromkeys(step.chip for step in steps), STYLES, strict=True))


def save_plot(model: str, steps: Sequence[Step], path: Path) -> None:
    figure, (roofs, shares) = plt.subplots(1, 2, figsize=(13, 6), width_ratios=(2.2, 1))
    draw_roofs(roofs, steps)
    draw_shares(shares, steps)
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=9, color=colour, label=group)
        for group, colour in COLOURS.items()
    ]
    handles += [
        Line2D([], [], linestyle=line, marker=marker, color="#555555", label=describe(chip))
        for chip, (marker, line) in styled(steps).items()
    ]
    hollow = Line2D([], [], linestyle="", marker="o", color="#555555", label="hollow: decode step")
    hollow.set(markerfacecolor="white", markeredgewidth=2)
    handles.append(hollow)
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False)
    figure.suptitle(f"{model}: modelled roofline of every operator, area = share of the time")
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=120)


def describe(chip: Device) -> str:
    return f"{chip.name}: {chip.tflops:g} TFLOP/s, {chip.bandwidth_gb_per_s:g} GB/s"


def main() -> None:
    options = arguments()
    graph, _, _ = lowered_graph(find_model(options.model))
    load = Workload.default(graph)
    chips = [device(name) for name in options.devices]
    steps = [priced(graph, load, prefill, chip) for prefill in (True, False) for chip in chips]
    for step in steps:
        report(step)
    save_plot(graph.name, steps, options.output)
    print(f"\nwrote {options.output}")


if __name__ == "__main__":
    main()
