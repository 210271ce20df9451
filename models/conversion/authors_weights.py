"""What the authors call each weight; nothing missing, nothing left over, every shape right."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from planner.ir.errors import InputError

# Beginnings of names: stock's (planner's), and the authors'.
STOCK = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
SCHEDULER = {
    "head.": "scheduler.mlp_head.",
    "encoder.norm.": "scheduler.scheduler_up_proj.net.0.",
    "encoder.first.": "scheduler.scheduler_up_proj.net.1.",
    "encoder.second.": "scheduler.scheduler_up_proj.net.3.",
}
PREDICTORS = {
    "image.": "model.image_score_predictor.",
    "output.": "model.output_text_score_predictor.",
}
# Buffers that models compute, and a predictor that Dynamic-LLaVA's code holds and never calls.
_UNUSED = re.compile(
    r".*\.rotary_emb\.inv_freq|.*\.embeddings\.position_ids|model\.instruct_score_predictor\..*"
)

Shapes = Mapping[str, tuple[int, ...]]


def authors_names(names: Mapping[str, str], wanted: Shapes) -> dict[str, str]:
    """Name -> the authors', for all wanted, by the beginnings of both."""
    found = {}
    for name in wanted:
        ours, theirs = next(pair for pair in names.items() if name.startswith(pair[0]))
        found[name] = theirs + name.removeprefix(ours)
    return found


def without_unused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that no computation reads."""
    return {name: value for name, value in tensors.items() if not _UNUSED.fullmatch(name)}


def check(tensors: Mapping[str, Tensor], wanted: Shapes, folder: Path) -> None:
    """Raise InputError unless the tensors of a folder are those wanted, by the authors' names."""
    kinds = (
        ("lack", set(wanted) - set(tensors)),
        ("have no place for", set(tensors) - set(wanted)),
        (
            "have another shape for",
            {n for n, s in wanted.items() if n in tensors and tensors[n].shape != s},
        ),
        ("are not finite in", {n for n, value in tensors.items() if not _finite(value)}),
    )
    for said, names in kinds:
        if not names:
            continue
        first = min(names)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        shapes = ""
        if said == "have another shape for":
            shapes = f": {[*tensors[first].shape]} and not {[*wanted[first]]}"
        raise InputError(f"the weights in '{folder}' {said} {first}{more}{shapes}")


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(value))
