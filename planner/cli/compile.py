"""``planner compile``: a plan for a model under a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.command_options import (
    CalibrationData,
    Convention,
    Recover,
    Scheduler,
    check_beside_scheduler,
    command,
)
from planner.cli.console import Console, amount, print_records, say, table
from planner.cli.kernels import KernelOptions
from planner.cli.stock_model import load_stock
from planner.planning.request import Request
from planner.progress import Say

if TYPE_CHECKING:
    from planner.kernels.targets.manifest import Manifest
    from planner.planning.compiler import Compiled
    from planner.schedule import Schedule


@command(*(field.name for field in fields(Request)))
def compile_command(
    request: Request,
    console: Console,
    kernels: KernelOptions,
    data: CalibrationData,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder [default: build/<model>].")
    ] = None,
    recover: Recover = "",
    scheduler: Scheduler = None,
    convention: Convention = "planner",
    print_between_passes: Annotated[
        bool, typer.Option("--print-between-passes", help="Print the graph after every pass.")
    ] = False,
) -> None:
    """Decide what of a model to run under a budget, with proof; write the plan.

    With --images, --text or --recover the weights are loaded: utilities are measured on that data,
    and a checkpoint of the plan, recovered, lies beside plan.yaml.
    """
    from planner.cli.debug import PASSES, debug_level, explain
    from planner.files import check_folder
    from planner.ir.errors import InputError
    from planner.planning.compiler import compile_plan
    from planner.planning.plan_costs import published_cost

    if scheduler is not None:
        if kernels.target:
            raise InputError("--target is not for --scheduler: index-driven kernels serve any plan")
        check_beside_scheduler(request)
        if recover or data or print_between_passes:
            raise InputError(
                "--scheduler makes plans itself: leave out --recover, --images, --text and "
                "--print-between-passes"
            )
    build = kernels.builder(request)
    level = debug_level()
    folder = output or Path("build") / Path(request.model.rstrip("/")).name
    if scheduler is not None:
        _compile_schedule(request, scheduler, folder, console, convention)
        return
    if recover or data:
        if kernels.target:
            raise InputError("--target is for plans alone: give it without --recover or data")
        if convention != "planner":
            raise InputError("--convention is for plans alone: give it without --recover or data")
        _compile_recovered(request, recover, data, folder, console)
        return
    check_folder(folder)
    with console.status() as update:
        if request.utilities == "magnitude":
            request = _by_weight_norms(request, update)
        compiled = compile_plan(request, update)
        for line in explain(compiled, level):
            say(line)
        manifest, files = None, None
        if build is not None:
            load = compiled.pricing.workload
            manifest, files = build(compiled.graph, compiled.plan, load, progress=update)
        between = print_between_passes or level >= PASSES
        path = write_outputs(compiled, folder, between, files)
    published = {}
    if convention != "planner":
        priced = compiled.pricing
        published = published_cost(
            convention, compiled.graph, compiled.plan, priced.workload, priced.device
        )

    def summary() -> None:
        _print_summary(compiled, path, console.verbose)
        _print_published(convention, published)
        if manifest is not None:
            sources = len({kernel.source for kernel in manifest.kernels})
            print(
                f"wrote {len(manifest.kernels)} kernels in {sources} sources to "
                f"{folder / 'kernels'} (see: planner kernels {folder})"
            )

    facts = {"convention": {"name": convention, "cost": published}} if published else {}
    console.show(document(compiled, path, manifest) | facts, summary)


def _print_published(convention: str, cost: Mapping[str, Mapping[str, float]]) -> None:
    """Lines on costs as a published convention counts them; none without costs."""
    for metric, values in cost.items():
        print(
            f"as {convention} counts, {metric}: {amount(values['plan'], metric)} of "
            f"{amount(values['base'], metric)}, {values['fraction']:.4f}"
        )


def _by_weight_norms(request: Request, update: Say) -> Request:
    """A request with a file of what its model's weights say."""
    from planner.models.recovery.recovering import Recovering

    stock = load_stock(request, update, "auto")
    known = Recovering(stock.model, stock.graph).utilities(request)
    return replace(request, utilities=known.path)


def _compile_recovered(
    request: Request, recover: str, data: CalibrationData, folder: Path, console: Console
) -> None:
    """Calibrate a loaded model, plan it, recover, and write a checkpoint with its plan."""
    from contextlib import contextmanager

    from planner.files import check_new
    from planner.models.recovery.oneshot import oneshot_on

    check_new(folder)
    with console.status() as update:

        @contextmanager
        def stage(name: str) -> Iterator[None]:
            update(name)
            yield

        stock = load_stock(request, update)
        update("read")
        recovering = stock.recovering(recover, data)
        done = oneshot_on(recovering, request, folder, stock.folder, stock.stored_dtype, stage)
        path = write_outputs(done.compiled, folder, between=False, kernels=None)

    def summary() -> None:
        _print_summary(done.compiled, path, console.verbose)
        if done.measured is not None:
            print(f"utilities: {done.measured.how}")
        print(f"{len(done.weights)} weights recovered; the checkpoint is in {folder}")

    facts = {
        "folder": str(folder),
        "recovered": len(done.weights),
        "plain": done.exported is not None and done.exported.plain,
        "measured": None if done.measured is None else done.measured.how,
    }
    console.show(document(done.compiled, path) | facts, summary)


def _compile_schedule(
    request: Request, scheduler: str, folder: Path, console: Console, convention: str
) -> None:
    """Check, price and write a schedule, whose plans a scheduler makes at run time."""
    from planner.files import output_folder
    from planner.models.scheduling import compile_schedule
    from planner.schedule import save_schedule

    with console.status() as update:
        schedule = compile_schedule(request, scheduler, update, convention)
        path = output_folder(folder) / "schedule.yaml"
        save_schedule(schedule, path)
    console.show(
        {"schedule": str(path), **asdict(schedule)}, lambda: _print_schedule(schedule, path)
    )


def _print_schedule(schedule: Schedule, path: Path) -> None:
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
    if more := schedule.overhead:
        print(
            f"not counted: {amount(more['latency_token'], 'flops')} of the latency token, "
            f"{amount(more['scheduler'], 'flops')} of the scheduler"
        )
    _print_published(schedule.convention, schedule.published)
    print(f"wrote {path}")


def write_outputs(
    compiled: Compiled, folder: Path, between: bool, kernels: Mapping[str, bytes] | None
) -> Path:
    """Write plan.yaml and graph.txt (the narrowed graph, with costs); the plan's path.

    `between` prints the graph after every pass; `kernels` are files of the folder of that name,
    which is replaced, or None to leave it alone.
    """
    from planner.files import output_folder, write_folder, write_together
    from planner.ir.cost import price
    from planner.ir.graph import Operator
    from planner.ir.graph_text import print_graph
    from planner.plan import dump_plan
    from planner.planning.compiler import specialised

    printer = (lambda name, graph: say(f"-- {name}\n{print_graph(graph)}")) if between else None
    graph = specialised(compiled.graph, compiled.plan, printer)
    sizes = compiled.pricing.workload.prefill({s.layer: s.keep for s in compiled.plan.tokens})

    def comment(operator: Operator) -> str:
        cost = price(operator, graph, sizes, compiled.pricing.device)
        return f"{amount(cost.flops, 'flops')}, {amount(cost.bytes, 'bytes')}, {cost.bound}"

    path = output_folder(folder) / "plan.yaml"
    texts = {folder / "graph.txt": print_graph(graph, comment), path: dump_plan(compiled.plan)}
    write_together({name: text.encode() for name, text in texts.items()})
    # Kernels say which plan they are of, so that old ones beside a new plan are refused.
    if kernels is not None:
        write_folder(folder / "kernels", kernels)
    return path


def document(compiled: Compiled, path: Path, manifest: Manifest | None = None) -> dict[str, Any]:
    """The JSON document of compile."""
    plan = compiled.plan
    kernels = {} if manifest is None else {"kernels": manifest.model_dump()}
    return kernels | {
        "plan": str(path),
        "model": plan.model,
        "cost": plan.cost,
        "utilisation": max(plan.utilisation.values(), default=1.0),
        "utilisations": plan.utilisation,
        "solver": {name: plan.solver[name] for name in ("status", "gap")}
        | {"seconds": compiled.solution.seconds},
        "kept": kept(compiled),
        "utilities": plan.provenance["utilities"],
        "notes": list(compiled.notes),
        "from_cache": compiled.from_cache,
        "seconds": compiled.seconds,
    }


def kept(compiled: Compiled) -> dict[str, dict[str, int]]:
    """How many switches of each kind stay on."""
    plan, graph = compiled.plan, compiled.graph
    counted = {"layers": {"kept": plan.layers - len(plan.layers_off), "of": plan.layers}}
    for kind in ("heads", "mlp"):
        sites = graph.sites_of(kind)
        if sites:
            switches = sum(len(plan.kept(site).switches) for site in sites)
            counted[kind] = {"kept": switches, "of": sum(site.switches for site in sites)}
    if of := compiled.pricing.workload.image_tokens:
        counted["tokens"] = {"kept": plan.tokens[-1].keep if plan.tokens else of, "of": of}
    return counted


_LABELS = {
    "layers": "layers",
    "heads": "attention heads (KV groups)",
    "mlp": "MLP groups",
    "tokens": "image tokens",
}


def _print_summary(compiled: Compiled, path: Path, verbose: bool) -> None:
    plan, load = compiled.plan, compiled.pricing.workload
    budget = ", ".join(f"{metric} {limit}" for metric, limit in plan.budget.items())
    print(f"{plan.model} under {budget}")
    selector = compiled.pricing.switches.selector
    if plan.tokens and selector is not None:
        most = ", at most as many as below" if selector.is_adaptive else ""
        print(f"image tokens are picked by {selector}{most}")
    if plan.kv:
        print(f"the KV cache evicts by {plan.kv}")
    print(
        f"workload: {load.image_tokens} image + {load.text_tokens} text tokens, "
        f"{load.new_tokens} new, batch {load.batch}; seconds are modelled on "
        f"{compiled.pricing.device.name}"
    )
    if plan.provenance["utilities"] == "prior":
        print(
            "utilities: prior - no weights were looked at, so which heads and groups stay is a "
            "guess; measure them before you rely on answers"
        )
    for note in compiled.notes[: None if verbose else 3]:
        print(f"note: {note}")
    print()
    counted = [{"what": _LABELS[kind], **count} for kind, count in kept(compiled).items()]
    print_records({"kept": "{what}", "on": "{kept}", "of": "{of}"}, counted)
    print()
    rows = [
        [
            metric,
            amount(values["plan"], metric),
            amount(values["base"], metric),
            f"{values['fraction']:.4f}",
            f"{plan.utilisation[metric]:.4%}" if metric in plan.utilisation else "-",
        ]
        for metric, values in plan.cost.items()
    ]
    table(["cost", "plan", "base", "fraction", "of limit"], rows)
    print()
    solver = plan.solver
    spent = sum(compiled.seconds.values())
    print(
        f"solver: {solver['status']}, gap {solver['gap']:.1e}, {compiled.solution.seconds:.2f} s; "
        f"{spent:.1f} s in all{' (graph from the cache)' if compiled.from_cache else ''}"
    )
    if verbose:
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in compiled.seconds.items())
        print(f"stages: {stages}")
    print(f"wrote {path} and {path.parent / 'graph.txt'}")
