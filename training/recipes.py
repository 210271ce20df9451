"""What can be trained: a configuration's `recipe` names a row here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.ir.errors import InputError
from planner.training import adallava, tiny_llava
from planner.training.config import RunConfig, parse_config, read_settings


@dataclass(frozen=True)
class Recipe:
    """A schema, and what trains by it."""

    schema: type[RunConfig]
    train: Callable[[Any], Any]


RECIPES: Mapping[str, Recipe] = {
    "tiny-llava": Recipe(tiny_llava.TinyLlavaConfig, tiny_llava.train),
    "adallava": Recipe(adallava.AdaLlavaConfig, adallava.train),
}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> tuple[Recipe, RunConfig]:
    """Read a configuration with ``key=value`` overrides, by the schema of its recipe.

    Raises:
        InputError: no such file, recipe or key, or a value that does not fit.
    """
    values = read_settings(path, overrides)
    recipe = RECIPES.get(str(values.get("recipe")))
    if recipe is None:
        raise InputError(f"{path}: recipe '{values.get('recipe')}' is none of {', '.join(RECIPES)}")
    return recipe, parse_config(recipe.schema, values, str(path))
