"""NumPy archives (.npz) that anyone may have written, read within limits."""

from __future__ import annotations

import io
import math
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.files import MEBIBYTE, read_bytes
from planner.ir.errors import InputError

_MOST_BYTES = 256 * MEBIBYTE
_MOST_ARRAYS = 100_000
# Kinds of NumPy types: booleans, integers, floating-point numbers, text.
_KINDS = "biufU"
# What the archive's directory says of one array begins with these bytes.
_ENTRY = b"PK\x01\x02"

# Version of an array's header -> what reads it; later versions are for arrays of records.
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_arrays(path: Path, what: str, like: str) -> dict[str, npt.NDArray[Any]]:
    """Read all arrays of an archive; numbers and text only.

    `what` it should be, and is `like`, for messages: ``utilities file``, ``.npz with one array per
    site``. InputError where it cannot be read, is no such archive, or has more than is read.
    """
    contents = read_bytes(path, what, _MOST_BYTES)
    try:
        if contents.count(_ENTRY) > _MOST_ARRAYS:
            raise ValueError(f"more than {_MOST_ARRAYS} arrays")
        with zipfile.ZipFile(io.BytesIO(contents)) as archive, warnings.catch_warnings():
            # NumPy warns of headers that Python 2 wrote.
            warnings.simplefilter("ignore")
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > _MOST_BYTES:
                raise InputError(
                    f"the {what} '{path}' holds more than {_MOST_BYTES // MEBIBYTE} MiB, "
                    "which is more than is read"
                )
            return {
                entry.filename.removesuffix(".npy"): _array(archive.read(entry))
                for entry in entries
            }
    # RuntimeError: an archive with a password, or an unknown compression.
    except (
        OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, MemoryError,
        zlib.error, zipfile.BadZipFile,
    ):  # fmt: skip
        raise InputError(f"'{path}' is not a {what} ({like})") from None


def _array(contents: bytes) -> npt.NDArray[Any]:
    """One array, whose header is believed only where the bytes behind it bear it out."""
    stream = io.BytesIO(contents)
    version = np.lib.format.read_magic(stream)
    shape, _, dtype = _HEADERS[version](stream)
    stated = math.prod(shape) * dtype.itemsize
    if dtype.kind not in _KINDS or stated != len(contents) - stream.tell():
        raise ValueError("an array of another size or type than its header says")
    stream.seek(0)
    array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array
