"""Files: read within limits, whatever a path may lead to; written whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EISDIR, ENOTDIR
from pathlib import Path

from safetensors import SafetensorError

from planner.ir.errors import InputError

MEBIBYTE = 1 << 20
# Opening a FIFO that nobody writes to would otherwise never return.
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_bytes(path: Path, what: str, most_bytes: int) -> bytes:
    """Read a whole regular file, unless it is larger. `what`: it should be, for messages: ``plan``.

    InputError where there is none, it is a folder, a pipe or a device, or it is too large.
    """
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, _READ_FLAGS)) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"the {what} '{path}' is not a file with contents")
            # Files that the system makes up, as in /proc, say that their size is 0.
            contents = stream.read(most_bytes + 1) if found.st_size <= most_bytes else b""
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"there is no {what} '{path}'") from None
    except IsADirectoryError:
        raise InputError(f"the {what} '{path}' is a folder, not a file") from None
    # ValueError: a path with a NUL in it.
    except (OSError, ValueError):
        raise InputError(f"the {what} '{path}' cannot be read") from None
    if max(found.st_size, len(contents)) > most_bytes:
        raise InputError(
            f"the {what} '{path}' has more than {most_bytes // MEBIBYTE} MiB, "
            "which is more than is read"
        )
    return contents


def read_text(path: Path, what: str, most_bytes: int) -> str:
    """Read a whole file of UTF-8 text; see `read_bytes`."""
    try:
        return read_bytes(path, what, most_bytes).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"the {what} '{path}' cannot be read: it is not UTF-8 text") from None


def output_folder(path: Path) -> Path:
    """Create a folder for output; InputError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write to '{path}': {_reason(error)}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to '{path}': permission denied")
    return path


def check_folder(path: Path) -> None:
    """Raise InputError where there is no writing into a folder; makes none that is not there."""
    try:
        found = next(place for place in (path.absolute(), *path.absolute().parents) if _is(place))
        if not found.is_dir():
            raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR))
        # File systems that the system makes up, as /proc, take nothing whatever they permit.
        with tempfile.TemporaryDirectory(dir=found, prefix=".planner."):
            pass
    except PermissionError:
        raise InputError(f"cannot write to '{path}': permission denied") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write to '{path}': {_reason(error)}") from None


def _is(path: Path) -> bool:
    """Whether something is there; OSError or ValueError where nothing can be."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def check_output(path: Path, suffix: str) -> None:
    """Check a file's name before the work for it, and make its folder; else InputError."""
    if path.suffix != suffix or path.is_dir():
        raise InputError(f"the output '{path}' must be a file with the suffix {suffix}")
    output_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder whole, in place of one that may be there; `files`: contents by path inside."""
    with whole_folder(path, replaces=True) as folder:
        for name, contents in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(contents)


def check_new(folder: Path) -> None:
    """Raise InputError where a folder to be made is there already, and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"'{folder}' is there already and not empty: name a new folder")


@contextmanager
def whole_folder(folder: Path, replaces: bool = False) -> Iterator[Path]:
    """A temporary folder that takes its name when all went well, and else is gone.

    An empty folder of that name gives way, one with contents where the new one `replaces` it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write to '{folder}': {_reason(error)}") from None
    fresh = made / "new"
    try:
        fresh.mkdir()
        yield fresh
        for path in fresh.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        if not (replaces and folder.exists()):
            fresh.replace(folder)
        else:
            folder.replace(made / "old")
            try:
                fresh.replace(folder)
            except OSError:
                (made / "old").replace(folder)
                raise
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write '{folder}': {_reason(error)}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _reason(error: OSError | ValueError | SafetensorError) -> str:
    """What the system says is wrong; a ValueError says that a path holds a NUL."""
    return str(getattr(error, "strerror", None) or error)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old one or the whole new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a file atomically: a reader sees the old one or the whole new one."""
    write_together({path: contents})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write files of one folder that belong together: none where one of them cannot be.

    Each is written atomically, and they take their names at once, one after the other.
    """
    temporary: dict[Path, str] = {}
    try:
        for path, contents in files.items():
            if path.is_dir():
                raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
            handle, temporary[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as stream:
                stream.write(contents)
            os.chmod(temporary[path], 0o666 & ~_umask())
        for path in files:
            os.replace(temporary[path], path)
            del temporary[path]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write '{path}': {_reason(error)}") from None
    finally:
        for left in temporary.values():
            Path(left).unlink(missing_ok=True)
