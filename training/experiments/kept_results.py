"""What was measured is kept in a file, and measured again when something about it has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.files import write_text


def kept(path: Path, identity: Any) -> dict[str, Any] | None:
    """The result in a file; None where there is none of this identity (JSON)."""
    if not path.is_file():
        return None
    known = json.loads(path.read_text())
    return dict(known["result"]) if known["identity"] == identity else None


def kept_or_measured(
    path: Path, identity: Any, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result in a file, or a new one where there is none of the same identity."""
    known = kept(path, identity)
    if known is not None:
        return known
    result = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"identity": identity, "result": result}, indent=1) + "\n")
    return result
