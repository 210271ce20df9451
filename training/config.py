"""Configurations: a YAML file checked against a pydantic schema, with `key=value` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from planner.documents import parse_yaml, read_yaml
from planner.ir.errors import InputError

__all__ = ["Config", "load_config", "parse_config"]


class Config(BaseModel):
    """Base of all configurations: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(schema: type[ConfigT], path: str | Path, overrides: Iterable[str] = ()) -> ConfigT:
    """Read a YAML file and apply overrides such as ``"learning_rate=1e-3"`` (values are YAML)."""
    path = Path(path)
    values = read_yaml(path, "configuration") or {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, found {type(values).__name__}.")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f'"--set {override}" should be "--set key=value".')
        values[key.strip()] = parse_yaml(value, f"the value of {key.strip()}")
    return parse_config(schema, values, str(path))


def parse_config(
    schema: type[ConfigT], values: Mapping[str, Any], source: str = "config"
) -> ConfigT:
    """Check values against a schema; the first thing wrong becomes one sentence."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, schema.model_fields, n=1)
            hint = (
                f'; did you mean "{near[0]}"?'
                if near
                else f"; known: {', '.join(schema.model_fields)}."
            )
            raise InputError(f'{source}: unknown key "{key}"{hint}') from None
        raise InputError(
            f'{source}: "{key}": {problem["msg"]} (found {problem["input"]!r}).'
        ) from None
