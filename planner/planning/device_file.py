"""Devices that `planner calibrate` measured, by file.

A device file is one JSON document: what was measured (`planner.ir.cost.measured_device`), on which
machine and with which libraries, and how far predictions were off.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from planner.documents import of_format, read_json, validated
from planner.files import write_text
from planner.ir.cost.measured_device import MeasuredDevice

FORMAT = 3
_KEY, _WHAT = "planner_device", "device file"


def read_device(path: Path) -> MeasuredDevice:
    """What a device file holds; InputError where it is none."""
    return _read(path, path.stat().st_mtime_ns if path.is_file() else 0)


@cache
def _read(path: Path, changed: int) -> MeasuredDevice:
    facts = of_format(read_json(path, _WHAT), _KEY, FORMAT, path, _WHAT)
    # Its place is its name, by which a plan finds it again.
    facts["name"] = str(path)
    return validated(MeasuredDevice, facts, f"the {_WHAT} '{path}'")


def save_device(path: Path, measured: MeasuredDevice) -> None:
    """Write a device file, atomically."""
    document: dict[str, Any] = {_KEY: FORMAT, **asdict(measured)}
    write_text(path, json.dumps(document, indent=1) + "\n")
