"""Writing a checkpoint of a plan's model, whole or not at all, and checked before it appears."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planner.files import check_new, whole_folder
from planner.ir.errors import PlannerError
from planner.ir.graph import Graph
from planner.models.export.planned_export import RECORD, load, save_planned
from planner.models.export.uniform_export import NotPlain, save_plain
from planner.models.running.bindings import bind
from planner.models.running.program import Program
from planner.models.running.skipping import obeying
from planner.plan import Plan, dump_plan

# Relative error of the logits that a checkpoint read back may have, by precision.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LOWER_PRECISION = 3e-2
# What a model folder holds beside weights and configs: processor, tokenizer, chat template.
_COMPANIONS = frozenset((".jinja", ".json", ".model", ".py", ".tiktoken", ".txt"))
_OWN = frozenset(("config.json", "generation_config.json", RECORD, "plan.yaml"))


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    plain: bool  # whether stock transformers loads it
    why_not: str  # where it is not plain, why, in one sentence; else ""
    parameters: int  # numbers in the weights
    base_parameters: int
    error: float  # largest relative one of the logits, read back, against the planned model


def export(
    model: Any,
    graph: Graph,
    plan: Plan,
    folder: Path,
    inputs: Mapping[str, Any],
    companions: Path | None = None,
    stored_dtype: torch.dtype | None = None,
) -> Exported:
    """Write a plan's model as a checkpoint.

    Token stages do not live in weights: they stay a note in ``plan.yaml``.

    Args:
        model: the base model, dense, in evaluation mode; left as it was.
        folder: to be made; an empty one may be there.
        inputs: arguments of the model, images included, on which what was written is compared.
        companions: folder to copy processor and tokenizer files from.
        stored_dtype: of weights in the file; by default as in the model.

    Raises:
        InputError: the plan is not of this model, or the folder is not empty.
        PlannerError: what was written does not compute what the plan says.
    """
    plan.check(graph)
    check_new(folder)
    narrowed = replace(plan, tokens=(), kv="")
    with torch.no_grad(), obeying(model, graph, narrowed):
        expected = model(**inputs).logits
    program = Program.build([narrowed], graph, bind(model, graph))
    text = dump_plan(plan)
    origin = {"planner_plan": f"plan.yaml, sha256 {sha256(text.encode()).hexdigest()[:16]}"}
    why_not = ""
    with whole_folder(folder) as temporary:
        try:
            smaller = save_plain(model, program, temporary, stored_dtype, **origin)
            error = _error(smaller, inputs, expected)
            if error > _tolerance(expected):
                raise NotPlain(
                    f"a smaller {type(model).__name__} computes something else (relative error "
                    f"{error:.1e}), so what it does depends on the number of a layer or a size"
                )
        except NotPlain as reason:
            why_not = str(reason)
            for path in temporary.iterdir():
                path.unlink()
            save_planned(model, graph, program, temporary, stored_dtype, **origin)
            smaller = load(temporary)
            error = _error(smaller, inputs, expected)
            if error > _tolerance(expected):
                raise PlannerError(
                    f"the exported model is off by {error:.1e}: this is a bug in planner"
                ) from None
        (temporary / "plan.yaml").write_text(text, encoding="utf-8")
        if companions is not None:
            _copy_companions(companions, temporary)
    return Exported(folder, not why_not, why_not, _parameters(smaller), _parameters(model), error)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _tolerance(expected: Tensor) -> float:
    return TOLERANCE.get(expected.dtype, LOWER_PRECISION)


@torch.no_grad()
def _error(model: Any, inputs: Mapping[str, Any], expected: Tensor) -> float:
    """Largest relative error of the logits over tokens."""
    logits = model.to(expected.device)(**inputs).logits.double()
    expected = expected.double()
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _copy_companions(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        is_index = path.name.endswith(".index.json")
        if path.suffix in _COMPANIONS and path.name not in _OWN and not is_index:
            shutil.copyfile(path, target / path.name)
