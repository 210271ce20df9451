"""What training takes besides planner itself, asked for before anything is imported or loaded."""

from __future__ import annotations

from importlib.util import find_spec

from planner.ir.errors import InputError


def require_extras() -> None:
    """Raise InputError unless the packages of ``planner[train]`` are installed."""
    for package in ("accelerate", "datasets", "peft", "pyarrow"):
        if find_spec(package) is None:
            raise InputError(f"training needs {package}: pip install 'planner[train]'")
