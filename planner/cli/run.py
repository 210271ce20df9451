"""``planner run``: ask a model one question under a budget."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.command_options import (
    Dtype,
    Place,
    Scheduler,
    check_beside_scheduler,
    command,
    refuse_unused,
)
from planner.cli.console import Console, amount
from planner.cli.explain import layer_rows, print_layers, skipped
from planner.cli.kernels import KernelsToRun, kernels_to_run
from planner.planning.request import Request
from planner.progress import Say

if TYPE_CHECKING:
    from planner.ir.cost import Workload
    from planner.ir.graph import Graph
    from planner.kernels.choice import Kernels
    from planner.kernels.targets.loaded_kernels import Loaded
    from planner.models.scheduling import Scheduled
    from planner.plan import Plan
    from planner.schedule import Schedule


@dataclass(frozen=True)
class _Question:
    """What is asked, and where it is answered."""

    prompt: str
    pictures: Sequence[Any]
    dtype: str
    place: str
    kernels: Kernels
    generated: Loaded | None
    # What is told the answer while it is made; None where nobody reads along.
    say: Say | None = None

    def on(self, model: Any, processor: Any) -> tuple[dict[str, Any], int, int]:
        """(a model's inputs, how many of their tokens are of images, and how many are not).

        InputError where they and one token of an answer are more than the model has places for.
        """
        from planner.loading import check_places, count_image_tokens, prompt_inputs

        inputs = prompt_inputs(model, processor, self.prompt, *self.pictures)
        tokens, of_images = int(inputs["input_ids"].shape[1]), count_image_tokens(model, inputs)
        check_places(model, tokens + 1)
        return inputs, of_images, tokens - of_images

    def kernels_used(self) -> AbstractContextManager[Any]:
        """Inside, launches are served by generated kernels, if the user named some."""
        return nullcontext() if self.generated is None else self.generated.used()


@dataclass(frozen=True)
class _Answer:
    """What came of it."""

    facts: dict[str, Any]  # the answer itself, its tokens and seconds
    plan: Plan  # that was followed, with what it should cost
    graph: Graph
    prompt: Workload
    kept: dict[int, int]  # layer of a token stage -> image tokens that were left
    scheduled: Scheduled | None = None  # what decided, where that was a scheduler


@command(
    "model", "budget", "switches", "tokens", "kv", "utilities", "new_tokens", "device",
    "trust_remote_code",
    new_tokens="Most tokens to generate.",
)  # fmt: skip
def run_command(
    request: Request,
    console: Console,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture; may be given again.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan or schedule, instead of a budget.")
    ] = None,
    scheduler: Scheduler = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say layer by layer what ran.")
    ] = False,
    dtype: Dtype = "auto",
    place: Place = "cpu",
    kernels: KernelsToRun = "auto",
) -> None:
    """Answer one question, running only what the plan keeps."""
    from planner.api import question as asking
    from planner.ir.errors import InputError
    from planner.loading import load_image
    from planner.models.scheduling import compile_schedule
    from planner.plan import load_plan
    from planner.planning.plan_costs import PlanCosts
    from planner.schedule import is_schedule, load_schedule

    if request.new_tokens < 1:
        raise InputError("--new-tokens must be at least 1")
    if request.tokens is not None and not image:
        raise InputError(f"--tokens {request.tokens} picks image tokens: give an --image too")
    if plan is not None:
        if scheduler is not None:
            raise InputError("give either a --plan or a --scheduler, which makes plans itself")
        refuse_unused(
            request, "--plan is a whole plan", ("model", "new_tokens", "trust_remote_code")
        )
    elif scheduler is not None:
        check_beside_scheduler(request, "new_tokens")
    schedule = None
    if plan is not None and is_schedule(plan):
        schedule = load_schedule(plan)
    elif scheduler is not None:
        schedule = compile_schedule(request, scheduler)
    loaded = load_plan(plan) if plan and schedule is None else None
    request.limits()
    pictures = [load_image(path) for path in image or ()]
    with console.status() as update:
        say = None if console.as_json else partial(_say, update)
        on = kernels_to_run(kernels, place)
        question = _Question(prompt, pictures, dtype, place, *on, say)
        with asking(prompt):
            if schedule is not None:
                ran = _run_scheduled(schedule, request, question, update)
            else:
                ran = _run_planned(loaded, request, question, update)
    # The output embedding is computed for the last token alone.
    prompt_ran = replace(ran.prompt, new_tokens=ran.facts["tokens"] - 1, logits=1)
    of = prompt_ran.image_tokens
    document = {
        **ran.facts,
        "cost": ran.plan.cost,
        "cost_of_this_prompt": PlanCosts(ran.graph, prompt_ran).of(
            ran.plan, ran.kept, ran.facts.get("answer_tokens_stored")
        ),
        "image_tokens": [
            {"layer": layer, "of": of, "kept": left} for layer, left in ran.kept.items()
        ],
        "skipped": skipped(ran.plan, ran.graph, of, ran.kept),
        "scope": ran.plan.provenance.get("scope"),
        "utilities": ran.plan.provenance.get("utilities"),
    }
    if schedule is not None:
        document["scheduler"] = schedule.scheduler
    if explain:
        document["layers"] = layer_rows(ran.plan, ran.graph, ran.kept, ran.scheduled)
    console.show(document, lambda: _print_facts(document))


def _run_planned(plan: Plan | None, request: Request, question: _Question, update: Say) -> _Answer:
    """Answer under one plan, made for this prompt where none is given."""
    from planner.api import compile as compile_model
    from planner.api import graph_of, kept_image_tokens, plan_of, prompt_of
    from planner.loading import load_model

    update("load")
    model, processor, _ = load_model(
        request.model, question.dtype, question.place, request.trust_remote_code
    )
    inputs, image_tokens, text_tokens = question.on(model, processor)
    request = replace(request, image_tokens=image_tokens, text_tokens=text_tokens)
    if not question.pictures and image_tokens == 0:
        axes = [axis for axis in request.switches.split(",") if axis != "tokens"]
        request = replace(request, switches=",".join(axes))
    update("compile")
    options = {name: value for name, value in vars(request).items() if name not in _OF_THE_MODEL}
    chosen: dict[str, Any] = {
        "freeze": True,
        "kernels": question.kernels,
        "processor": processor,
        "progress": lambda done, total: update(f"measure what switches are worth: {done}/{total}"),
    }
    compile_model(model, request.budget, plan=plan, **chosen, **options)
    prompt = prompt_of(model, inputs)
    if question.generated is not None:
        question.generated.check(graph_of(model), plan_of(model), model.dtype)
    update("generate")
    facts = _generate(model, processor, inputs, request.new_tokens, question)
    kept = {layer: counts[0] for layer, counts in kept_image_tokens(model).items()}
    return _Answer(facts, plan_of(model), graph_of(model), prompt, kept)


# Fields of a Request that `planner.compile` is given otherwise.
_OF_THE_MODEL = ("model", "budget", "trust_remote_code")


def _run_scheduled(
    schedule: Schedule, request: Request, question: _Question, update: Say
) -> _Answer:
    """Answer under the plan that a scheduler makes."""
    from planner.ir.cost import Workload
    from planner.ir.structure import tiles
    from planner.models.running.skipping import session_on
    from planner.models.scheduling import load_scheduled
    from planner.planning.compiler import DEFAULT_DEVICE
    from planner.planning.plan_costs import PlanCosts
    from planner.planning.selectors import stages_of

    update("load")
    model, processor, scheduled = load_scheduled(
        schedule, question.dtype, question.place, request.trust_remote_code
    )
    graph = scheduled.graph
    inputs, image_tokens, text_tokens = question.on(model, processor)
    per_run = int(graph.properties["image_tokens"])
    stages = stages_of(schedule.tokens, image_tokens, per_run, tiles(graph))
    workload = Workload.default(graph, image_tokens, text_tokens, request.new_tokens)
    session = session_on(model, graph, kernels=question.kernels)
    prompt = session.implementation.prompt_of(inputs)
    if question.generated is not None:
        question.generated.check(graph, None, model.dtype)
    update("generate")
    chip = schedule.device or DEFAULT_DEVICE
    with scheduled.using(schedule.budget, stages, workload, chip):
        facts = _generate(model, processor, inputs, request.new_tokens, question)
        kept = {layer: counts[0] for layer, counts in scheduled.kept_image_tokens.items()}
    plan = scheduled.plans()[0]
    # Schedulers budget the language model alone.
    plan = replace(plan, provenance={**plan.provenance, "scope": "llm"})
    plan = replace(plan, cost=PlanCosts(graph, workload).of(plan))
    return _Answer(facts, plan, graph, prompt, kept, scheduled)


def _say(update: Say, text: str) -> None:
    """Print a piece of the answer, and stop saying what is being done."""
    if text:
        update("")
        print(text, end="", flush=True)


def _print_facts(document: dict[str, Any]) -> None:
    print()
    if "layers" in document:
        print_layers(document["layers"])
        print()
    gone = ", ".join(f"{what} {n}" for what, n in document["skipped"].items()) or "nothing"
    print(f"skipped: {gone}")
    if document["launches"]:
        launches = ", ".join(f"{kernel} {n}" for kernel, n in document["launches"].items())
        print(f"launches of planner's kernels: {launches}")
    if "generated" in document:
        served, every = (sum(document[name].values()) for name in ("generated", "launches"))
        print(f"served by generated kernels: {served} of {every}")
    rate = document["tokens_per_second"]
    count = document["tokens"]
    print(
        f"prefill {amount(document['prefill_seconds'], 'latency')} (the first, so a slow one), "
        f"{count} token{'s' * (count != 1)}"
        + ("" if rate is None else f", {rate:.1f} tokens/s")
        + f", KV cache {amount(document['kv_bytes'], 'bytes')}"
    )
    if "answer_tokens_stored" in document:
        print(f"of {count - 1} decoded tokens {document['answer_tokens_stored']} were stored")
    planned = document["cost"].get("flops")
    ran = document["cost_of_this_prompt"]["flops"]
    said = "" if planned in (None, ran) else f" (the plan says {planned['fraction']:.4f})"
    whole = "the base language model" if document.get("scope") == "llm" else "the base model"
    print(f"FLOPs of this prompt: {ran['fraction']:.4f} of {whole}'s{said}")


def _generate(
    model: Any, processor: Any, inputs: dict[str, Any], new_tokens: int, question: _Question
) -> dict[str, Any]:
    """The answer, its tokens, seconds of the prefill, tokens a second of the rest, cache bytes."""
    from transformers.generation.streamers import TextStreamer

    from planner.loading import refuse_nan
    from planner.models.running.kv_cache import answers_stored, cache_among, kv_bytes

    class Clock(TextStreamer):  # type: ignore[misc]
        """Notes when each token comes - first the prompt, then one at a time - and hands it on."""

        def __init__(self, tokenizer: Any) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []
            self.begun = False

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = text if self.begun else text.lstrip()
            self.begun = self.begun or bool(text)
            if question.say is not None:
                question.say(text + "\n" * stream_end)

    tokenizer = getattr(processor, "tokenizer", processor)
    clock = Clock(tokenizer)
    with _counted() as launches, question.kernels_used():
        run = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
            logits_processor=[refuse_nan],
            return_dict_in_generate=True,
        )
    length = int(inputs["input_ids"].shape[1])
    answer = tokenizer.decode(run.sequences[0, length:], skip_special_tokens=True).strip()
    prompt, first, *rest = clock.times
    spent = (rest[-1] - first) if rest else 0.0
    generated = question.generated
    cache = cache_among(run)
    stored = answers_stored(cache)
    served = {} if generated is None else {"generated": dict(sorted(generated.served.items()))}
    return served | {
        "answer": answer,
        "tokens": int(run.sequences.shape[1]) - length,
        "prefill_seconds": first - prompt,
        "tokens_per_second": len(rest) / spent if spent else None,
        "kv_bytes": kv_bytes(cache),
        **({} if stored is None else {"answer_tokens_stored": stored[0]}),
        "launches": dict(sorted(launches.items())),
    }


def _counted() -> AbstractContextManager[Counter[str]]:
    """Counts launches of planner's kernels; without Triton there are none."""
    from planner.kernels.choice import has_triton

    if not has_triton():
        return nullcontext(Counter())
    from planner.kernels.triton.launch import counted

    return counted()
