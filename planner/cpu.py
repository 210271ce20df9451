"""Which CPU this is: for what was measured on one and holds on its kind alone."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path


def cpu_name() -> str:
    """What people call it."""
    named = [line for line in cpu_kind().splitlines() if line.startswith("model name")]
    return named[0].partition(":")[2].strip() if named else platform.processor()


def cpu_kind() -> str:
    """What tells its kind from others, its instructions among it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        told = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
        return "\n".join(line for line in lines if line.split("\t")[0].strip() in told)
    return f"{platform.machine()} {platform.processor()}"
