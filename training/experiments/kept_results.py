"""What was measured is kept in a file, and measured again when something about it has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.files import write_text


def kept_or_measured(
    path: Path, identity: Any, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result in a file, or a new one where there is none of the same identity (JSON)."""
    if path.is_file():
        known = json.loads(path.read_text())
        if known["identity"] == identity:
            return dict(known["result"])
    result = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"identity": identity, "result": result}, indent=1) + "\n")
    return result
