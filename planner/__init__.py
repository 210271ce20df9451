"""planner: a compiler for adaptive multimodal inference.

Importing this package is cheap on purpose: torch and transformers are loaded by the functions
that need them, so that ``planner --help`` and a cached ``planner compile`` start at once.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    # A checkout keeps ir/, kernels/, models/ and training/ beside this folder; an installed
    # package has them inside it.
    __path__.append(str(_checkout))

# name -> module that defines it; resolved on first use.
_EXPORTS: dict[str, str] = {}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'planner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
