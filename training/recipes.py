"""What can be trained: a configuration's `recipe` names a row here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from planner.ir.errors import InputError
from planner.training import (
    adallava,
    fine_tuning,
    joined_llava,
    sparsification,
    tiny_llava,
    unified,
)
from planner.training.config import RunConfig, parse_config, read_settings

# The schema of a recipe's configurations, and what trains by one.
RECIPES: Mapping[str, tuple[type[RunConfig], Callable[[Any], Any]]] = {
    "tiny-llava": (tiny_llava.TinyLlavaConfig, tiny_llava.train),
    "adallava": (adallava.AdaLlavaConfig, adallava.train),
    "dynamic-llava": (sparsification.DynamicLlavaConfig, sparsification.train),
    "fine-tuning": (fine_tuning.FineTuningConfig, fine_tuning.train),
    "joined-llava": (joined_llava.JoinedConfig, joined_llava.train),
    "unified": (unified.UnifiedConfig, unified.train),
}


def load_recipe(
    path: str | Path, overrides: Iterable[str] = ()
) -> tuple[Callable[[Any], Any], RunConfig]:
    """Read a configuration with ``key=value`` overrides: what trains by it, and the configuration.

    Raises InputError: no such file, recipe or key, or a value that does not fit.
    """
    values = read_settings(path, overrides)
    name = str(values.get("recipe"))
    if name not in RECIPES:
        raise InputError(f"{path}: recipe '{name}' is none of {', '.join(RECIPES)}")
    schema, train = RECIPES[name]
    return train, parse_config(schema, values, str(path))
