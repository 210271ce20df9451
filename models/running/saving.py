"""A planned model in a folder: what `save_pretrained` writes beside the weights, and reads back.

The weights are those of the stock model, which any loader takes. The plan is beside them:

    planner_settings.yaml   how `planner.compile` was called
    planner_plan.yaml       the plan that held; one file for each where samples have their own
    planner_utilities.npz   measured utilities, if there were any, for budgets to come
    planner_means.npz       what sinks read on average, under ``recover="compensate"``
"""

from __future__ import annotations

import inspect
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from planner.arrays import read_arrays
from planner.documents import dump_yaml, read_yaml, validated
from planner.files import MEBIBYTE, output_folder, read_bytes, write_bytes
from planner.ir.errors import InputError
from planner.models.running.session import Session, language_model
from planner.plan import Plan, dump_plan, load_plan
from planner.planning.budgets import Budget
from planner.planning.request import Request

_log = logging.getLogger("planner")

SETTINGS = "planner_settings.yaml"
_UTILITIES = "planner_utilities.npz"
_MEANS = "planner_means.npz"
_MOST_BYTES = 256 * MEBIBYTE
# Fields of a Request that are no business of a saved model's.
_LEFT_OUT = ("model", "budget", "trust_remote_code")
_METHOD = "save_pretrained"


class _Settings(BaseModel):
    """Schema of `SETTINGS`; `request` holds what differs from the defaults."""

    model_config = ConfigDict(extra="forbid")
    planner_settings: Literal[1]
    plans: int = Field(ge=1, le=4096)
    freeze: bool = False
    kernels: str = "auto"
    compensated: bool = False
    budget: dict[str, str] | None = None
    request: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A plan that was saved beside a model's weights."""

    plans: tuple[Plan, ...]  # one for all samples, or one per sample
    budget: Budget | None  # that holds for every prompt; None where the plans do
    options: dict[str, Any]  # of `planner.compile`
    # See `planner.models.recovery.compensation`; empty where nothing is compensated.
    means: Mapping[str, Tensor]


def _plan_name(number: int, of: int) -> str:
    return "planner_plan.yaml" if of == 1 else f"planner_plan_{number}.yaml"


def saved_files(session: Session) -> dict[str, bytes]:
    """Files that say what holds in this context, by name; none where that is the stock model."""
    # A budget that waited for options is a plan from here on.
    if session.implementation is None or session.program is None or session.setting is None:
        return {}
    plans = session.setting.plans
    files = {
        _plan_name(number, len(plans)): dump_plan(plan).encode()
        for number, plan in enumerate(plans)
    }
    request: dict[str, Any] = {}
    if session.planning is not None:
        request = {
            field.name: value
            for field in fields(Request)
            if field.name not in _LEFT_OUT
            and (value := getattr(session.planning.request, field.name)) != field.default
        }
    utilities = Path(request.get("utilities", ""))
    if utilities.is_file():
        files[_UTILITIES] = read_bytes(utilities, "utilities file", _MOST_BYTES)
        request["utilities"] = _UTILITIES
    elif "utilities" in request:
        request["utilities"] = str(utilities)
    if means := session.implementation.preparing.products.means:
        stream = io.BytesIO()
        arrays: dict[str, Any] = {path: mean.float().cpu().numpy() for path, mean in means.items()}
        np.savez(stream, **arrays)
        files[_MEANS] = stream.getvalue()
    asked = session.setting.asked
    limits = () if asked is None else asked.describe().items()
    settings = _Settings(
        planner_settings=1,
        plans=len(plans),
        budget={metric: text.removesuffix(" of base") for metric, text in limits} or None,
        compensated=bool(means),
        **session.implementation.compile_options,
        request=request,
    )
    # Last, since it says which others belong to it.
    files[SETTINGS] = dump_yaml(settings.model_dump(exclude_none=True)).encode()
    return files


def read_saved(folder: Path) -> Saved:
    """What `saved_files` were written to a folder.

    Raises InputError: there are none, they are broken, or name files that are not among them.
    """
    path = folder / SETTINGS
    if folder.is_dir() and not path.exists():
        raise InputError(
            f"'{folder}' has no {SETTINGS}: no plan was saved there, so load the model as it is "
            "and call planner.compile"
        )
    settings = validated(_Settings, read_yaml(path, "settings"), f"the settings file '{path}'")
    request = settings.request
    known = {field.name for field in fields(Request)} - set(_LEFT_OUT)
    if unknown := set(request) - known:
        raise InputError(f"the settings '{path}' have the unknown option '{min(unknown):.80}'")
    if request.get("utilities") == _UTILITIES:
        request = request | {"utilities": folder / _UTILITIES}
    of = settings.plans
    plans = tuple(load_plan(folder / _plan_name(number, of)) for number in range(of))
    budget = Budget.of(settings.budget) if settings.budget else None
    options = {"freeze": settings.freeze, "kernels": settings.kernels, **request}
    return Saved(plans, budget, options, _means(folder) if settings.compensated else {})


def _means(folder: Path) -> dict[str, Tensor]:
    """Path of a sink -> mean of its input features."""
    arrays = read_arrays(folder / _MEANS, "file of means", ".npz with one array per linear")
    if any(array.dtype != np.float32 for array in arrays.values()):
        raise InputError(f"the means in '{folder / _MEANS}' are not float32")
    return {path: torch.from_numpy(array) for path, array in arrays.items()}


class SavePretrained:
    """Stands in for `save_pretrained` of a planned model, or of what wraps it.

    `owner`: whose method it is.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock method; the plan's files are written first, so that it uploads them too."""
        stock = getattr(type(self.owner), _METHOD)
        given = inspect.signature(stock).bind(self.owner, *args, **kwargs).arguments
        session = Session.of(self.owner)
        files = {} if session is None else saved_files(session)
        if files and given.get("is_main_process", True):
            folder = output_folder(Path(given["save_directory"]))
            for name, contents in files.items():
                write_bytes(folder / name, contents)
            _log.warning(
                "the weights in '%s' are not narrowed: the plan is in %s beside them, and "
                "planner.load restores both",
                folder,
                SETTINGS,
            )
        return stock(self.owner, *args, **kwargs)


def _savers(model: nn.Module) -> Iterator[nn.Module]:
    """What has a `save_pretrained` of its own, from a wrapper to the language model inside."""
    known = language_model(model)
    for module in getattr(model, "_orig_mod", model).modules():
        if hasattr(type(module), _METHOD):
            yield module
        if module is known:
            return


def save_plans_of(model: nn.Module) -> None:
    """Have `save_pretrained` of a planned model, and of what wraps it, write the plan."""
    for module in _savers(model):
        # What somebody else has put there is left alone.
        module.__dict__.setdefault(_METHOD, SavePretrained(module))


def save_no_plans_of(model: nn.Module) -> None:
    """Undo `save_plans_of`."""
    for module in _savers(model):
        if isinstance(module.__dict__.get(_METHOD), SavePretrained):
            del module.__dict__[_METHOD]
