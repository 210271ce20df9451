"""A planned model in a folder: what `save_pretrained` writes beside the weights, and reads back.

The weights are those of the stock model, which any loader takes. The plan is beside them:

    planner_settings.yaml   how `planner.compile` was called
    planner_plan.yaml       the plan that held; one file for each where samples have their own
    planner_utilities.npz   measured utilities, if there were any, for budgets to come
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from planner.documents import dump_yaml, read_yaml
from planner.files import MEBIBYTE, output_folder, read_bytes, write_bytes
from planner.ir.errors import InputError
from planner.models.running.session import Session, language_model
from planner.plan import Plan, dump_plan, load_plan
from planner.planning.budgets import Budget
from planner.planning.compiler import Request

_log = logging.getLogger("planner")

SETTINGS = "planner_settings.yaml"
_UTILITIES = "planner_utilities.npz"
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
    budget: dict[str, str] | None = None
    request: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A plan that was saved beside a model's weights.

    Attributes:
        plans: one for all samples, or one per sample.
        budget: that holds for every prompt; None where the plans do.
        options: of `planner.compile`.
    """

    plans: tuple[Plan, ...]
    budget: Budget | None
    options: dict[str, Any]


def _plan_name(number: int, of: int) -> str:
    return "planner_plan.yaml" if of == 1 else f"planner_plan_{number}.yaml"


def saved_files(session: Session) -> dict[str, bytes]:
    """Files that say what holds in this context, by name; none where that is the stock model."""
    # A budget that waited for options is a plan from here on.
    if session.implementation is None or session.program is None or session.setting is None:
        return {}
    if session.implementation.preparing.products.corrects:
        _log.warning("no plan is written: what recover='compensate' adds to it cannot be saved")
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
    asked = session.setting.asked
    limits = () if asked is None else asked.describe().items()
    settings = _Settings(
        planner_settings=1,
        plans=len(plans),
        budget={metric: text.removesuffix(" of base") for metric, text in limits} or None,
        **session.implementation.compile_options,
        request=request,
    )
    # Last, since it says which others belong to it.
    files[SETTINGS] = dump_yaml(settings.model_dump(exclude_none=True)).encode()
    return files


def read_saved(folder: Path) -> Saved:
    """What `saved_files` were written to a folder.

    Raises:
        InputError: there are none, they are broken, or name files that are not among them.
    """
    path = folder / SETTINGS
    if folder.is_dir() and not path.exists():
        raise InputError(
            f"'{folder}' has no {SETTINGS}: no plan was saved there, so load the model as it is "
            "and call planner.compile"
        )
    try:
        settings = _Settings.model_validate(read_yaml(path, "settings"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        reason = first["msg"].lower()
        raise InputError(f"the settings '{path}' are broken at {where}: {reason}") from None
    request = settings.request
    known = {field.name for field in fields(Request)} - set(_LEFT_OUT)
    if unknown := set(request) - known:
        raise InputError(f"the settings '{path}' have the unknown option '{min(unknown):.80}'")
    if request.get("utilities") == _UTILITIES:
        request = request | {"utilities": folder / _UTILITIES}
    of = settings.plans
    plans = tuple(load_plan(folder / _plan_name(number, of)) for number in range(of))
    budget = Budget.of(settings.budget) if settings.budget else None
    return Saved(plans, budget, {"freeze": settings.freeze, "kernels": settings.kernels, **request})


class SavePretrained:
    """Stands in for `save_pretrained` of a planned model, or of what wraps it.

    Args:
        owner: whose method it is.
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
