"""Measuring a model under budgets against the same model without a plan, in one run.

Rounds are interleaved - base, budget, budget, ..., each round beginning one further on - so that
whatever else the machine does falls on all alike. Ratios are taken within a round, and their
medians reported with their range, which says what they are worth. Nothing is reported unless the
plan that keeps everything gives the base model's very logits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from planner.api import budget as under
from planner.api import compile as compile_model
from planner.api import graph_of, kept_image_tokens, plan_of, prompt_of, restore
from planner.ir.errors import PlannerError
from planner.loading import count_image_tokens
from planner.planning.plan_costs import PlanCosts
from planner.planning.request import Request
from planner.progress import Say


def measure(
    model: Any,
    inputs: dict[str, Any],
    fractions: Sequence[float],
    request: Request,
    decode: int,
    repeat: int,
    kernels: str,
    progress: Say,
) -> dict[str, Any]:
    """Time prefill and decoding per budget; see `planner bench`.

    `inputs` are of one batch, with input_ids and attention_mask; `fractions` are budgets; the
    request says how plans are made; `decode` tokens are generated after the first, in as many
    rounds as `repeat` says.

    Returns:
        ``{"rows": [{"budget", "fraction", "prefill_seconds", "prefill_ratio", "prefill_range",
        "realised_over_ideal", "decode_tokens_per_second", "decode_speedup", "decode_range",
        "kv_bytes"}], ...}``; ranges are the least and the most of a round's ratios, for the base
        model of its seconds over their median. PlannerError where budget 1 does not give the base
        model's logits.
    """
    progress("compile")
    batch, length = inputs["input_ids"].shape
    image_tokens = count_image_tokens(model, inputs)
    load = {"image_tokens": image_tokens, "text_tokens": length - image_tokens}
    how: dict[str, Any] = {"switches": request.switches, "new_tokens": decode, "batch": batch}
    how |= {"freeze": True, "kernels": kernels, **load}
    options = {name: getattr(request, name) for name in ("tokens", "kv", "utilities")}
    compile_model(model, 1.0, **how, utilities="prior")
    try:
        _check_parity(model, inputs)
        dense = plan_of(model)
        options["progress"] = lambda done, of: progress(
            f"measure what switches are worth: {done}/{of}"
        )
        compile_model(model, 1.0, **how, **options)
        under(model, dense)
        progress("warm up")
        _time(model, inputs, decode, nullcontext())
        plans, ran = {}, {}
        workload = replace(prompt_of(model, inputs), new_tokens=decode, logits=1)
        costs = PlanCosts(graph_of(model), workload)
        for fraction in fractions:
            with under(model, fraction):
                _time(model, inputs, decode, nullcontext())
                plans[fraction] = plan_of(model)
                # An adaptive selector may have kept less than the plan counts with.
                kept = {k: max(counts) for k, counts in kept_image_tokens(model).items()}
                ran[fraction] = costs.of(plans[fraction], kept)["flops"]["fraction"]
        whom: tuple[float | None, ...] = (None, *plans)
        runs: dict[float | None, list[tuple[float, float, int]]] = {which: [] for which in whom}
        for index in range(repeat):
            progress(f"round {index + 1} of {repeat}")
            first = index % len(whom)
            for which in (*whom[first:], *whom[:first]):
                context = nullcontext() if which is None else under(model, plans[which])
                runs[which].append(_time(model, inputs, decode, context))
    finally:
        restore(model)
    rows = [_row("base", 1.0, runs[None], runs[None], batch)]
    for fraction in fractions:
        rows.append(_row(f"{fraction:g}", ran[fraction], runs[fraction], runs[None], batch))
    return {**load, "batch": batch, "decode": decode, "repeat": repeat, "rows": rows}


def _row(
    name: str,
    ideal: float,
    runs: list[tuple[float, float, int]],
    base: list[tuple[float, float, int]],
    batch: int,
) -> dict[str, Any]:
    prefill, decoding = (statistics.median(run[i] for run in runs) for i in (0, 1))
    of_itself = runs is base
    if of_itself:
        # Then the ranges say how steady the clock was.
        base = [(prefill, decoding, 0)] * len(runs)
    ratios = [run[0] / other[0] for run, other in zip(runs, base, strict=True)]
    faster = [other[1] / run[1] for run, other in zip(runs, base, strict=True)]
    ratio = statistics.median(ratios)
    return {
        "budget": name,
        "fraction": ideal,
        "prefill_seconds": prefill,
        "prefill_ratio": ratio,
        "prefill_range": [min(ratios), max(ratios)],
        "realised_over_ideal": ratio / ideal,
        "decode_tokens_per_second": batch / decoding,
        # The median of reciprocals is not the reciprocal of the median.
        "decode_speedup": 1.0 if of_itself else statistics.median(faster),
        "decode_range": [min(faster), max(faster)],
        "kv_bytes": runs[0][2],
    }


def _check_parity(model: Any, inputs: dict[str, Any]) -> None:
    """Budget 1 must be the base model, bit for bit."""
    import torch

    with torch.inference_mode():
        with under(model, 1.0):
            planned = model(**inputs).logits
        restored = model(**inputs).logits
    if not torch.equal(planned, restored):
        raise PlannerError("budget 1 does not give the base model's logits: nothing is reported")


def _synchronise(model: Any) -> None:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _time(
    model: Any, inputs: dict[str, Any], decode: int, context: AbstractContextManager[Any]
) -> tuple[float, float, int]:
    """(seconds of the prefill, seconds a decoded token, bytes in the cache at the end)."""
    import torch
    from transformers.cache_utils import DynamicCache

    from planner.models.running.kv_cache import cache_argument, kv_bytes

    with torch.inference_mode(), context:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        cached = {cache_argument(model.forward): cache, "use_cache": True}
        _synchronise(model)
        started = time.perf_counter()
        output = model(**inputs, **cached, logits_to_keep=1)
        _synchronise(model)
        prefilled = time.perf_counter()
        token = output.logits[:, -1:].argmax(-1)
        mask = inputs["attention_mask"]
        for _ in range(decode):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = model(input_ids=token, attention_mask=mask, **cached)
            token = output.logits[:, -1:].argmax(-1)
        _synchronise(model)
        done = time.perf_counter()
    return prefilled - started, (done - prefilled) / decode, kv_bytes(cache)
