"""What can be trained: a configuration's `recipe` names a row here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.documents import read_yaml
from planner.ir.errors import InputError
from planner.training.adallava import AdaLlavaConfig
from planner.training.adallava import train as train_adallava
from planner.training.config import Config, load_config
from planner.training.tiny_llava import TinyLlavaConfig
from planner.training.tiny_llava import train as train_tiny_llava

__all__ = ["RECIPES", "Recipe", "load_recipe"]


@dataclass(frozen=True)
class Recipe:
    """A schema, and what trains by it."""

    schema: type[Config]
    train: Callable[[Any], Any]


RECIPES: Mapping[str, Recipe] = {
    "tiny-llava": Recipe(TinyLlavaConfig, train_tiny_llava),
    "adallava": Recipe(AdaLlavaConfig, train_adallava),
}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> tuple[Recipe, Config]:
    """Read a configuration with ``key=value`` overrides, by the schema of its recipe.

    Raises:
        InputError: no such file, recipe or key, or a value that does not fit.
    """
    values = read_yaml(Path(path), "configuration")
    name = str(values.get("recipe")) if isinstance(values, dict) else ""
    if name not in RECIPES:
        raise InputError(f"{path}: recipe '{name}' is none of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    return recipe, load_config(recipe.schema, path, overrides)
