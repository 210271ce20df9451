"""``planner run``: ask a model one question under a budget."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.printing import Json, Quiet, Verbose, amount, print_json, status
from planner.cli.shared_options import Device, Dtype, KvPolicyOption, Model, TrustRemoteCode
from planner.cli.with_scheduler import (
    Explain,
    SchedulerOption,
    explain_plan,
    print_explanation,
    run_scheduled,
)

if TYPE_CHECKING:
    from planner.ir.graph import Graph
    from planner.plan import Plan

__all__ = ["run_command"]


def run_command(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")],
    image: Annotated[Path | None, typer.Option("--image", "-i", help="A picture.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", "-b", help="As for compile; repeatable.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A plan or schedule, instead of a budget.")
    ] = None,
    scheduler: SchedulerOption = None,
    explain: Explain = False,
    switches: Annotated[str, typer.Option("--switches", help="As for compile.")] = "all",
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="A token selector, such as fastv:k=2,r=0.5.")
    ] = None,
    kv: KvPolicyOption = None,
    utilities: Annotated[str, typer.Option("--utilities", help="As for compile.")] = "prior",
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Most tokens to generate.")] = 64,
    roofline: Device = None,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option("--on", help="Where to run: cpu, cuda.")] = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer one question, running only what the plan keeps."""
    from planner.api import compile as compile_model
    from planner.api import graph_of, kept_image_tokens, plan_of
    from planner.ir.cost import Workload
    from planner.ir.errors import InputError
    from planner.loading import count_image_tokens, load_image, load_model, prompt_inputs
    from planner.models.scheduling import compile_schedule
    from planner.plan import load_plan
    from planner.planning.budgets import Budget
    from planner.planning.plan_costs import PlanCosts
    from planner.schedule import is_schedule, load_schedule

    if new_tokens < 1:
        raise InputError("--new-tokens must be at least 1")
    if kv is not None and (plan is not None or scheduler is not None):
        raise InputError("--kv is part of a plan: give it with --budget, not beside another plan")
    if tokens is not None and image is None:
        raise InputError(f"--tokens {tokens} picks image tokens: give an --image too")
    schedule = None
    if plan is not None and is_schedule(plan):
        schedule = load_schedule(plan)
    elif scheduler is not None:
        schedule = compile_schedule(model, budget or ["0.65"], scheduler, tokens)
    loaded = load_plan(plan) if plan and schedule is None else None
    if plan is not None and (budget or tokens or utilities != "prior"):
        raise InputError("--plan is a whole plan: give it without --budget, --tokens, --utilities")
    wanted = Budget.of(budget or ["0.65"])
    if roofline is None and any(limit.metric == "latency" for limit in wanted.limits):
        raise InputError("a latency budget needs --device: seconds mean nothing without one")
    picture = load_image(image) if image else None
    kept: dict[int, int] = {}
    with status(not (quiet or as_json), verbose) as update:
        if schedule is not None:
            document, made, scheduled = run_scheduled(
                schedule, prompt, picture, new_tokens, dtype, device, trust_remote_code, update
            )
            graph = scheduled.graph
            kept = {row["layer"]: row["kept"] for row in document["image_tokens"]}
        else:
            scheduled = None
            update("load")
            stock, processor, _ = load_model(model, dtype, device, trust_remote_code)
            inputs = prompt_inputs(stock, processor, prompt, picture)
            image_tokens = count_image_tokens(stock, inputs)
            text_tokens = int(inputs["input_ids"].shape[1]) - image_tokens
            if picture is None and image_tokens == 0 and "tokens" in switches:
                switches = ",".join(axis for axis in switches.split(",") if axis != "tokens")
            update("compile")
            compile_model(
                stock,
                wanted,
                plan=loaded,
                switches=switches,
                tokens=tokens,
                kv=kv,
                utilities=utilities,
                device=roofline,
                image_tokens=image_tokens,
                text_tokens=text_tokens,
                new_tokens=new_tokens,
            )
            update("generate")
            answer, facts = generate(stock, processor, inputs, new_tokens)
            made, graph = plan_of(stock), graph_of(stock)
            kept = {layer: counts[0] for layer, counts in kept_image_tokens(stock).items()}
            load = Workload.default(graph, image_tokens, text_tokens, facts["tokens"] - 1)
            document = {
                "answer": answer,
                **facts,
                "cost": made.cost,
                "cost_of_this_prompt": PlanCosts(graph, load).of(made, kept),
                "image_tokens": kept_rows(image_tokens, kept),
                "skipped": skipped(made, graph, image_tokens, kept),
                "scope": made.provenance.get("scope"),
                "utilities": made.provenance.get("utilities"),
            }
    if explain:
        document["layers"] = explain_plan(made, graph, scheduled, kept)
    if as_json:
        print_json(document)
        return
    print(document["answer"])
    if not quiet:
        _print_facts(document)


def _print_facts(document: dict[str, Any]) -> None:
    print()
    if "layers" in document:
        print_explanation(document["layers"])
        print()
    gone = ", ".join(f"{what} {n}" for what, n in document["skipped"].items()) or "nothing"
    print(f"skipped: {gone}")
    rate = document["tokens_per_second"]
    count = document["tokens"]
    print(
        f"prefill {amount(document['prefill_seconds'], 'latency')} (the first, so a slow one), "
        f"{count} token{'s' * (count != 1)}"
        + ("" if rate is None else f", {rate:.1f} tokens/s")
        + f", KV cache {amount(document['kv_bytes'], 'bytes')}"
    )
    planned = document["cost"].get("flops")
    ran = document["cost_of_this_prompt"]["flops"]
    said = "" if planned in (None, ran) else f" (the plan says {planned['fraction']:.4f})"
    whole = "the base language model" if document.get("scope") == "llm" else "the base model"
    print(f"FLOPs of this prompt: {ran['fraction']:.4f} of {whole}'s{said}")


def generate(
    model: Any, processor: Any, inputs: dict[str, Any], new_tokens: int
) -> tuple[str, dict[str, Any]]:
    """(answer, seconds of the prefill, tokens, tokens a second of the rest, bytes in the cache)."""
    from transformers.generation.streamers import BaseStreamer

    from planner.models.running.kv_cache import cache_among, kv_bytes

    class Clock(BaseStreamer):  # type: ignore[misc]
        """Notes when each token comes: first the prompt, then one at a time."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    clock = Clock()
    run = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
    )
    length = int(inputs["input_ids"].shape[1])
    tokenizer = getattr(processor, "tokenizer", processor)
    answer = tokenizer.decode(run.sequences[0, length:], skip_special_tokens=True).strip()
    prompt, first, *rest = clock.times
    spent = (rest[-1] - first) if rest else 0.0
    return answer, {
        "tokens": int(run.sequences.shape[1]) - length,
        "prefill_seconds": first - prompt,
        "tokens_per_second": len(rest) / spent if spent else None,
        "kv_bytes": kv_bytes(cache_among(run)),
    }


def kept_rows(image_tokens: int, kept: Mapping[int, int]) -> list[dict[str, int]]:
    """What was left of an image, by layer of a token stage, as JSON has it."""
    return [{"layer": layer, "of": image_tokens, "kept": count} for layer, count in kept.items()]


def skipped(
    plan: Plan, graph: Graph, image_tokens: int, kept: Mapping[int, int] | None = None
) -> dict[str, str]:
    """What a plan for a graph leaves out, in words.

    `kept`: layer of a token stage -> image tokens that were really left.
    """
    gone: dict[str, str] = {}
    if plan.layers_off:
        gone["layers"] = f"{len(plan.layers_off)} of {plan.layers}"
    for kind, what in (("heads", "heads"), ("mlp", "MLP groups")):
        sites = [site for site in graph.sites_of(kind) if site.layer not in plan.layers_off]
        narrowed = sum(not plan.kept(site).everything for site in sites)
        if narrowed:
            gone[f"{what} in layers"] = f"{narrowed} of {plan.layers}"
    for stage in plan.tokens:
        planned = round(image_tokens * stage.keep / stage.of)
        left = (kept or {}).get(stage.layer, planned)
        gone[f"image tokens before layer {stage.layer}"] = (
            f"{image_tokens - left} of {image_tokens}"
        )
    if plan.kv:
        gone["cache entries by"] = plan.kv
    return gone
