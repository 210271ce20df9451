"""Configurations: a YAML file checked against a pydantic schema, with `key=value` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from planner.documents import parse_yaml, read_yaml
from planner.ir.errors import InputError
from planner.training.data.conversations import FAMILY_WEIGHTS

# Folder of the configurations that planner comes with.
CONFIGS = Path(__file__).parent / "configs"


class RunConfig(BaseModel):
    """What every training run has; immutable, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    output_dir: str
    export_dir: str | None = None
    seed: int = 0

    # Of rendered scenes: how many there are, and what their questions are about.
    scenes: int = 1_000_000
    description_share: float
    family_weights: dict[str, float] = FAMILY_WEIGHTS
    max_text_tokens: int = 110

    max_steps: int
    batch_size: int = 32
    learning_rate: float
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    save_steps: int = 200
    logging_steps: int = 20
    dataloader_workers: int = 0


C = TypeVar("C", bound=RunConfig)


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a YAML file and apply overrides such as ``"learning_rate=1e-3"`` (values are YAML).

    Raises InputError: there is no such file, or it does not hold keys and values.
    """
    path = Path(path)
    values = read_yaml(path, "configuration") or {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, found {type(values).__name__}.")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f'"--set {override}" should be "--set key=value".')
        values[key.strip()] = parse_yaml(value, f"the value of {key.strip()}")
    return values


def parse_config(schema: type[C], values: Mapping[str, Any], source: str) -> C:
    """Check values against a schema; the first thing wrong becomes one sentence."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] != "extra_forbidden":
            raise InputError(
                f'{source}: "{key}": {problem["msg"]} (found {problem["input"]!r}).'
            ) from None
        near = difflib.get_close_matches(key, schema.model_fields, n=1)
        known = ", ".join(schema.model_fields)
        hint = f'did you mean "{near[0]}"?' if near else f"known: {known}."
        raise InputError(f'{source}: unknown key "{key}"; {hint}') from None
