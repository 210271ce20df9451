"""What `planner compile` and `planner run` do when a scheduler makes the plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.printing import amount, print_json

if TYPE_CHECKING:
    from planner.models.scheduling import Scheduled
    from planner.schedule import Schedule

__all__ = [
    "Explain",
    "SchedulerOption",
    "compile_scheduled",
    "explain_plan",
    "print_explanation",
    "print_schedule",
    "run_scheduled",
]

SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        help="Folder of a trained scheduler (or adallava-l, adallava-h, adallava-cost of "
        "tiny-llava): it makes a plan for every input.",
    ),
]
Explain = Annotated[bool, typer.Option("--explain", help="Say layer by layer what ran.")]


def compile_scheduled(
    model: str,
    budget: list[str],
    scheduler: str,
    folder: Path,
    tokens: str | None,
    image_tokens: int | None,
    text_tokens: int,
    trust_remote_code: bool,
    update: Any,
) -> tuple[Schedule, Path]:
    """Check, price and write a schedule; (schedule, its path)."""
    from planner.files import output_folder
    from planner.models.scheduling import compile_schedule
    from planner.schedule import save_schedule

    schedule = compile_schedule(
        model, budget, scheduler, tokens, image_tokens, text_tokens, trust_remote_code, update
    )
    path = output_folder(folder) / "schedule.yaml"
    save_schedule(schedule, path)
    return schedule, path


def print_schedule(schedule: Schedule, path: Path, as_json: bool, quiet: bool) -> None:
    """What `planner compile --scheduler` prints."""
    from dataclasses import asdict

    if as_json:
        print_json({"schedule": str(path), **asdict(schedule)})
    elif not quiet:
        flops = schedule.cost["flops"]
        print(f"{schedule.model} under {schedule.budget}, plans by {schedule.switches} per input")
        if schedule.measure == "switches":
            print(f"switches: {schedule.limit} of {schedule.of} on")
        else:
            share = schedule.limit / max(schedule.of, 1)
            print(f"switches: {share:.4f} of what they cost in {schedule.measure} on")
        print(
            f"FLOPs of the language model's prefill: {amount(flops['plan'], 'flops')} of "
            f"{amount(flops['base'], 'flops')}, {flops['fraction']:.4f}"
        )
        print(f"wrote {path}")


def run_scheduled(
    schedule: Schedule,
    prompt: str,
    picture: Any,
    new_tokens: int,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    update: Any,
) -> tuple[dict[str, Any], Any, Scheduled]:
    """Answer one question; (what is reported, the plan, the scheduled model)."""
    from planner.cli.run import generate, kept_rows, skipped
    from planner.ir.cost import Workload
    from planner.loading import count_image_tokens, prompt_inputs
    from planner.models.scheduling import load_scheduled
    from planner.planning.plan_costs import PlanCosts
    from planner.planning.selectors import stages_of

    update("load")
    model, processor, scheduled = load_scheduled(schedule, dtype, device, trust_remote_code)
    inputs = prompt_inputs(model, processor, prompt, picture)
    image_tokens = count_image_tokens(model, inputs)
    text_tokens = int(inputs["input_ids"].shape[1]) - image_tokens
    per_run = int(scheduled.graph.properties["image_tokens"])
    stages = stages_of(schedule.tokens, image_tokens, per_run)
    workload = Workload.default(scheduled.graph, image_tokens, text_tokens, new_tokens)
    update("generate")
    with scheduled.using(schedule.budget, stages, workload):
        answer, facts = generate(model, processor, inputs, new_tokens)
        kept = {layer: counts[0] for layer, counts in scheduled.kept_image_tokens.items()}
    plan = scheduled.plans(scheduled.base(stages))[0]
    # Schedulers budget the language model alone.
    plan = replace(plan, provenance={**plan.provenance, "scope": "llm"})
    ran = replace(workload, new_tokens=facts["tokens"] - 1)
    document = {
        "answer": answer,
        **facts,
        "cost": PlanCosts(scheduled.graph, workload).of(plan),
        "cost_of_this_prompt": PlanCosts(scheduled.graph, ran).of(plan, kept),
        "image_tokens": kept_rows(image_tokens, kept),
        "skipped": skipped(plan, scheduled.graph, image_tokens, kept),
        "scheduler": schedule.scheduler,
        "scope": "llm",
        "utilities": None,
    }
    return document, plan, scheduled


def explain_plan(
    plan: Any,
    graph: Any,
    scheduled: Scheduled | None = None,
    image_tokens: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Layer by layer: what is kept of it, and the scheduler's logits for it where there is one.

    `image_tokens`: layer of a token stage -> those that were really left, where that is known.
    """
    from planner.planning.selectors import selector_of

    scores = _scores(scheduled) if scheduled is not None else {}
    rows = []
    for layer in range(plan.layers):
        row: dict[str, Any] = {"layer": layer, "on": layer not in plan.layers_off}
        for kind in ("heads", "mlp"):
            site = graph.sites_by_name.get(f"{kind}.{layer}")
            if site is not None:
                kept = plan.kept(site)
                row[kind], row[f"{kind}_of"] = list(kept.switches), kept.of
        stages = [s for s in plan.tokens if s.layer <= layer]
        if stages:
            last = stages[-1]
            left = (image_tokens or {}).get(last.layer, last.keep)
            most = "" if left == last.keep else f", planned {last.keep}"
            # A cap is all that is known where nobody counted.
            unknown = last.layer not in (image_tokens or {}) and selector_of(last).is_adaptive
            least = "at most " if unknown else ""
            row["image_tokens"] = f"{least}{left} of {last.of}{most} ({last.selector})"
        if layer in scores:
            row["logits"] = scores[layer]
        rows.append(row)
    return rows


def _scores(scheduled: Scheduled) -> dict[int, list[float]]:
    """Layer -> the scheduler's logits for its switches, for the first sample."""
    if scheduled.logits is None:
        return {}
    row = [round(x, 3) for x in scheduled.logits[0].detach().tolist()]
    return {layer: row[places] for layer, places in scheduled.layout.by_layer().items()}


def print_explanation(rows: list[dict[str, Any]]) -> None:
    """The explanation as a table."""
    from planner.cli.printing import table
    from planner.ir.intervals import print_ranges

    headers = ["layer", "runs"]
    columns = [c for c in ("heads", "mlp", "image_tokens", "logits") if any(c in r for r in rows)]
    cells = []
    for row in rows:
        line = [str(row["layer"]), "yes" if row["on"] else "no"]
        for column in columns:
            value = row.get(column, "")
            if column in ("heads", "mlp") and column in row:
                text = "all" if len(value) == row[f"{column}_of"] else print_ranges(value)
            elif column == "logits" and value:
                shown = [f"{x:+.2f}" for x in value]
                text = shown[0] if len(shown) == 1 else f"{min(value):+.2f} to {max(value):+.2f}"
            else:
                text = str(value)
            line.append(text)
        cells.append(line)
    names = {"heads": "heads kept", "mlp": "MLP groups kept", "image_tokens": "image tokens"}
    table([*headers, *(names.get(c, c) for c in columns)], cells)
