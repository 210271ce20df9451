"""Partial results on disk, so that a killed calibration continues where it stopped.

A file beside the output holds what was measured so far, sample by sample and switch by switch; what
is missing is NaN. It is rewritten whole every few seconds and removed at the end.
"""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from planner.files import write_bytes
from planner.ir.errors import InputError

__all__ = ["Store"]

Array = npt.NDArray[np.float64]


class Store:
    """Arrays that fill up.

    Args:
        path: the file; None keeps nothing on disk.
        key: settings that the results depend on; a file of other settings is refused.
        shapes: array name -> shape.
        seconds: how often to write, at most.

    Attributes:
        arrays: name -> values, NaN where not measured; to be written to directly.
    """

    def __init__(
        self,
        path: Path | None,
        key: str,
        shapes: Mapping[str, tuple[int, ...]],
        seconds: float = 5.0,
    ) -> None:
        self.path = path
        self.key = key
        self.seconds = seconds
        self.arrays: dict[str, Array] = {n: np.full(s, np.nan) for n, s in shapes.items()}
        self._written = time.monotonic()
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
                key, arrays = str(found["key"]), {name: found[name] for name in self.arrays}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            raise InputError(f"'{path}' is no partial calibration: delete it") from None
        same = {n: a.shape for n, a in arrays.items()} == {
            n: a.shape for n, a in self.arrays.items()
        }
        if key != self.key or not same:
            raise InputError(
                f"'{path}' was left by a calibration of another model, other samples or other "
                "options: finish that one, or delete the file"
            )
        self.arrays = arrays

    def save(self, now: bool = False) -> None:
        """Write, unless that was done a moment ago."""
        if self.path is None or not (now or time.monotonic() - self._written >= self.seconds):
            return
        stream = io.BytesIO()
        np.savez(stream, key=np.array(self.key), **self.arrays)  # type: ignore[arg-type]
        write_bytes(self.path, stream.getvalue())
        self._written = time.monotonic()

    def remove(self) -> None:
        """Forget the file: everything is measured."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
