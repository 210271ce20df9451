"""Partial results on disk, so that a killed calibration continues where it stopped.

A file beside the output holds what was measured so far, sample by sample and switch by switch; what
is missing is NaN. It is rewritten whole every few seconds, and removed once the output is there.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from planner.arrays import read_arrays
from planner.files import write_bytes
from planner.ir.errors import InputError
from planner.solver.problem import Floats

# How often to write, at most.
_SECONDS = 5.0


class Store:
    """Arrays that fill up, to be written to directly; NaN where not measured.

    The key is settings that the results depend on; a file of other settings is refused. Without a
    path nothing is kept on disk.
    """

    def __init__(self, path: Path | None, key: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self.key = key
        self.arrays: dict[str, Floats] = {n: np.full(s, np.nan) for n, s in shapes.items()}
        self._written = time.monotonic()
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        found = read_arrays(path, "partial calibration", "delete it")
        key = str(found.pop("key", None))
        kinds = {name: (values.shape, values.dtype) for name, values in found.items()}
        wanted = {name: (values.shape, values.dtype) for name, values in self.arrays.items()}
        if key != self.key or kinds != wanted:
            raise InputError(
                f"'{path}' was left by a calibration of another model or scheduler, other "
                "samples or other options: finish that one, or delete the file"
            )
        self.arrays = found

    @property
    def done(self) -> int:
        """Measurements made so far."""
        return sum(int(np.isfinite(array).sum()) for array in self.arrays.values())

    @property
    def total(self) -> int:
        """All measurements."""
        return sum(array.size for array in self.arrays.values())

    def save(self, now: bool = False) -> None:
        """Write, unless that was done a moment ago."""
        if self.path is None or not (now or time.monotonic() - self._written >= _SECONDS):
            return
        stream = io.BytesIO()
        np.savez(stream, key=np.array(self.key), **self.arrays)  # type: ignore[arg-type]
        write_bytes(self.path, stream.getvalue())
        self._written = time.monotonic()

    def remove(self) -> None:
        """Forget the file: everything is measured."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
