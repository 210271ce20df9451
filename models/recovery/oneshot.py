"""From data to a running plan: calibrate, solve, recover, export (`planner.oneshot`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.calibration.samples import (
    Sample,
    read_questions,
    read_samples,
    sample_of,
)
from planner.models.calibration.text import passages, read_text, text_samples
from planner.models.export import Exported, export
from planner.models.recovery.recovering import Measured, Recovering
from planner.models.recovery.refit import replaced, storable
from planner.planning.compiler import Compiled, plan_graph, pose
from planner.planning.request import Request
from planner.planning.utilities import OF_WEIGHTS


@dataclass(frozen=True)
class Oneshot:
    """What one call came to."""

    compiled: Compiled  # the plan, and everything that led to it
    measured: Measured | None  # the utilities; None where the request names some
    weights: Mapping[str, Tensor]  # parameter name -> value, of those that were recovered
    exported: Exported | None  # the checkpoint; None where no folder was asked for


# What is calibrated on by default. Least squares want some fifty tokens a feature: passages of text
# take one forward pass, many at once, while a picture's answer has to be generated.
FEW, PASSAGES = 64, 768


def samples_of(model: Any, processor: Any, inputs: Any, recover: str = "") -> list[Sample] | None:
    """Samples from what `planner.oneshot` takes as inputs; None for built-in ones."""
    if inputs is None:
        return None
    if not isinstance(inputs, str | Path):
        return as_samples(model, inputs)
    path = Path(inputs)
    if processor is None:
        raise InputError(f"reading '{path}' takes the model's processor: give processor=...")
    images, text = (path, None) if path.is_dir() else (None, path)
    return read_inputs(model, processor, images, text, recover=recover)


def read_inputs(
    model: Any,
    processor: Any,
    images: Path | None,
    text: Path | None,
    count: int | None = None,
    prompts: Path | None = None,
    seed: int = 0,
    recover: str = "",
) -> list[Sample]:
    """Calibration samples from files.

    Args:
        model: answers where nobody else does.
        processor: of the model, or its tokenizer.
        images: folder of pictures.
        text: a file of text, instead.
        count: most samples to take; by default 768 of text for ``refit``, and else 64.
        prompts: see `planner.models.calibration.read_questions`.
        seed: which pictures are drawn.
        recover: what they are for.

    Raises InputError: neither or both are given, or cannot be read; the count is below 1.
    """
    if count is None:
        count = PASSAGES if text is not None and recover == "refit" else FEW
    if count < 1:
        raise InputError(f"the number of samples must be at least 1, not {count}")
    if (images is None) == (text is None):
        raise InputError("give either a folder of images or a text file")
    if text is not None:
        ids = passages(processor, read_text(text), count)
        return text_samples(ids.to(model.device))
    assert images is not None
    return read_samples(model, processor, read_questions(images, prompts), count, seed)


def as_samples(model: Any, inputs: Sequence[Any]) -> list[Sample]:
    """Calibration samples from model inputs.

    Args:
        model: answers prompts with pictures itself.
        inputs: `Sample` objects, or keyword arguments of the model, one row each. Of a prompt with
            pictures the model's own answer is judged, of text every token.

    Raises InputError: an input is neither, or has several rows.
    """
    return [found if isinstance(found, Sample) else _sample(model, found) for found in inputs]


def _sample(model: Any, inputs: Any) -> Sample:
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise InputError(
            'a calibration input is what the model is called with: {"input_ids": ..., ...}'
        )
    if len(ids) != 1 or set(inputs) - {"input_ids", "attention_mask"}:
        return sample_of(model, inputs)
    if ids.shape[1] < 2:
        raise InputError("a calibration text needs at least two tokens")
    return Sample(dict(inputs), ids.shape[1] - 1)


def oneshot_on(
    recovering: Recovering,
    request: Request,
    folder: Path | None = None,
    companions: Path | None = None,
    stored_dtype: torch.dtype | None = None,
    stage: Callable[[str], Any] = lambda name: nullcontext(),
) -> Oneshot:
    """Calibrate, solve, recover and export; the model is left as it was.

    Args:
        recovering: the model and its samples.
        request: what to compile; utilities ``auto`` are measured.
        folder: a new one for the checkpoint, if any.
        companions: see `planner.models.export.export`.
        stored_dtype: see `planner.models.export.export`.
        stage: context around each stage, by its name.

    Raises InputError: for anything wrong with the request.
    """
    pose(recovering.graph, replace(request, utilities="prior"))
    measured = None
    if request.utilities in OF_WEIGHTS:
        with stage("measure"):
            measured = recovering.utilities(request)
        request = replace(request, utilities=str(measured.path))
    graph = recovering.graph
    compiled = plan_graph(graph, request, stage)
    model, plan = recovering.model, compiled.plan
    with stage("recover"):
        weights = recovering.weights(plan)
    if folder is None:
        return Oneshot(compiled, measured, weights, None)
    inputs = _check_inputs(recovering, graph)
    weights = storable(weights, stored_dtype)
    with stage("export"), replaced(model, weights):
        exported = export(model, graph, plan, folder, inputs, companions, stored_dtype)
    return Oneshot(compiled, measured, weights, exported)


def _check_inputs(recovering: Recovering, graph: Graph) -> dict[str, Any]:
    """Inputs on which the written checkpoint is compared."""
    if recovering.samples:
        return dict(recovering.samples[0].inputs)
    words = int(recovering.model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, (1, 32), generator=generator)
    return {"input_ids": ids.to(recovering.model.device)}
