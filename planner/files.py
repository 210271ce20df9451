"""Writing files whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from planner.ir.errors import InputError

__all__ = ["output_folder", "write_bytes", "write_folder", "write_text"]


def output_folder(path: Path) -> Path:
    """Create a folder for output; InputError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to '{path}': {error.strerror or error}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to '{path}': permission denied")
    return path


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder whole, in place of one that may be there: a reader sees the old or the new.

    Args:
        path: the folder; its parent exists.
        files: contents by path inside.
    """
    made: str | None = None
    try:
        made = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
        os.chmod(made, 0o777 & ~_umask())
        fresh, old = Path(made) / "new", Path(made) / "old"
        for name, contents in files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(contents)
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror or error}") from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old one or the whole new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a file atomically: a reader sees the old one or the whole new one."""
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(contents)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror or error}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
