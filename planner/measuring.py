"""Measuring a model under budgets against the same model without a plan, in one run.

Rounds are interleaved - base, budget, budget, ..., base, ... - so that whatever else the machine
does falls on all alike, and medians are reported. Nothing is reported unless the plan that keeps
everything gives the base model's very logits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from planner.ir.errors import PlannerError
from planner.loading import count_image_tokens
from planner.runtime import budget as under
from planner.runtime import compile as compile_model
from planner.runtime import restore

__all__ = ["measure"]


def measure(
    model: Any,
    inputs: dict[str, Any],
    fractions: Sequence[float],
    switches: str,
    decode: int,
    repeat: int,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Time prefill and decoding per budget; see `planner bench`.

    Args:
        model: with weights.
        inputs: of one batch, with input_ids and attention_mask.
        fractions: budgets, of the base model's FLOPs.
        switches: as for compile.
        decode: tokens generated after the first.
        repeat: rounds.

    Returns:
        ``{"rows": [{"budget", "fraction", "prefill_seconds", "prefill_ratio",
        "realised_over_ideal", "decode_tokens_per_second", "decode_speedup", "kv_bytes"}], ...}``.

    Raises:
        PlannerError: where budget 1 does not give the base model's logits.
    """
    progress("compile")
    batch, length = inputs["input_ids"].shape
    image_tokens = count_image_tokens(model, inputs)
    load = {"image_tokens": image_tokens, "text_tokens": length - image_tokens}
    compile_model(model, 1.0, switches=switches, new_tokens=decode, batch=batch, **load)
    try:
        _check_parity(model, inputs)
        progress("warm up")
        plans = {}
        for fraction in fractions:
            with under(model, fraction) as plan:
                plans[fraction] = plan
                _time(model, inputs, decode, nullcontext())
        runs: dict[float | None, list[tuple[float, float, int]]] = {None: []}
        for index in range(repeat):
            progress(f"round {index + 1} of {repeat}")
            for which in (None, *fractions):
                context = nullcontext() if which is None else under(model, which)
                runs.setdefault(which, []).append(_time(model, inputs, decode, context))
    finally:
        restore(model)
    rows = [_row("base", 1.0, runs[None], runs[None])]
    for fraction in fractions:
        ideal = plans[fraction].cost["flops"]["fraction"]
        rows.append(_row(f"{fraction:g}", ideal, runs[fraction], runs[None]))
    return {
        **load,
        "batch": batch,
        "decode": decode,
        "repeat": repeat,
        "rows": rows,
    }


def _row(
    name: str,
    ideal: float,
    runs: list[tuple[float, float, int]],
    base: list[tuple[float, float, int]],
) -> dict[str, Any]:
    prefill, decoding = (statistics.median(run[i] for run in runs) for i in (0, 1))
    ratio = statistics.median(run[0] / other[0] for run, other in zip(runs, base, strict=True))
    faster = statistics.median(other[1] / run[1] for run, other in zip(runs, base, strict=True))
    return {
        "budget": name,
        "fraction": ideal,
        "prefill_seconds": prefill,
        "prefill_ratio": ratio,
        "realised_over_ideal": ratio / ideal,
        "decode_tokens_per_second": 1 / decoding,
        "decode_speedup": faster,
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

    from planner.models.cache import cache_argument, kv_bytes

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
