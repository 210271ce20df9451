"""LLaVA's conversation JSON as an Arrow table: read and checked once, then mapped into memory.

The public mixture of 665K records is a gigabyte of JSON, and several gigabytes as Python objects -
in every process of a machine, and again in every worker that touches them. So the first process
writes the records as an Arrow file into the cache folder, and all of them map that file through
`datasets`: its pages are shared, and a run that starts again parses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.files import output_folder, read_text
from planner.ir.errors import InputError
from planner.planning.graph_cache import cache_folder
from planner.training.requirements import require_extras

if TYPE_CHECKING:
    from datasets import Dataset

# LLaVA's own, of 665,000 conversations, has a gigabyte.
_MOST_BYTES = 16 << 30

# Of the Arrow files; another number does not find the old ones.
FORMAT = 1
_MARK = re.compile(r"[ \t\r\n]*(.?)[ \t\r\n]*", re.DOTALL)
# Held until the process ends, which removes them.
_temporary: list[tempfile.TemporaryDirectory[str]] = []


def open_records(path: Path) -> Dataset:
    """The records of a file in its order, mapped into memory.

    | column             | type                                                                  |
    |--------------------|-----------------------------------------------------------------------|
    | `id`               | string                                                                |
    | `image`            | string; null for text only                                            |
    | `texts`            | list of strings: question, answer, question, ..., image tags and all  |
    | `families`, `kinds`| list of strings or nulls, one per question; null where not given      |
    | `scene`            | string of JSON; null where there is none                              |
    | `fault`            | string: what is wrong with the record, whose other columns are null   |

    The Arrow file is in the cache folder, under a name that follows from path, size and time of the
    JSON file; one process writes it and others wait. Where the cache folder cannot be written to,
    every process has a temporary file of its own. Raises InputError: there is no such file, it is
    no list in JSON, or `datasets` is not installed.
    """
    require_extras()
    from datasets import Dataset
    from filelock import FileLock

    try:
        facts = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    key = f"{FORMAT} {path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    file = _folder() / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
    with FileLock(f"{file}.lock"):
        if file.is_file():
            with contextlib.suppress(OSError, ValueError):  # Arrow's errors are ValueErrors
                return Dataset.from_file(str(file))
        _write(path, file)
    return Dataset.from_file(str(file))


def _folder() -> Path:
    try:
        return output_folder(cache_folder() / "conversations")
    except InputError:
        _temporary.append(tempfile.TemporaryDirectory(prefix="planner-"))
        return Path(_temporary[-1].name)


def _write(path: Path, file: Path) -> None:
    """Write the Arrow file whole or not at all."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    texts = dict.fromkeys(("texts", "families", "kinds"), List(Value("string")))
    features = Features(dict.fromkeys(("id", "image", "scene", "fault"), Value("string")) | texts)
    fresh = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with ArrowWriter(features=features, path=str(fresh)) as writer:
            for number, record in enumerate(_json_list(path)):
                try:
                    row = _row(f"{path}, record {number}", record)
                except InputError as error:
                    row = dict.fromkeys(features) | {"fault": str(error)}
                writer.write(row)
            writer.finalize()
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)


def _json_list(path: Path) -> Iterator[Any]:
    """The items of a list in JSON, one at a time."""
    try:
        text = read_text(path, "file of conversations", _MOST_BYTES)
        decoder = json.JSONDecoder()
        mark, place = _mark(text, 0)
        if mark != "[":
            found = type(json.loads(text)).__name__
            raise InputError(f"{path}: expected a list of records, found {found}.")
        mark, behind = _mark(text, place)
        if mark == "]":
            place = behind
        else:
            mark = ","
        while mark == ",":
            item, place = decoder.raw_decode(text, place)
            yield item
            mark, place = _mark(text, place)
        if mark != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        if place < len(text):
            raise json.JSONDecodeError("Extra data", text, place)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON ({error}).") from error


def _mark(text: str, place: int) -> tuple[str, int]:
    """The first character that is not blank, and what is behind it and the blanks that follow."""
    found = _MARK.match(text, place)
    assert found is not None
    return found[1], found.end()


def _row(where: str, record: Any) -> dict[str, Any]:
    """A record as a row of the table; InputError says what is wrong with it."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object, found {type(record).__name__}.")
    name = str(record.get("id", ""))
    where += f' (id "{name}")'
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where}: "conversations" is missing or empty.')
    if isinstance(messages[0], dict) and messages[0].get("from") == "gpt":
        # As LLaVA does: a few records of its mixture begin with an answer, which is left out.
        messages = messages[1:]
    texts = []
    for position, message in enumerate(messages):
        speaker = "gpt" if position % 2 else "human"
        if not isinstance(message, dict) or message.get("from") != speaker:
            raise InputError(f'{where}: message {position} should be from "{speaker}".')
        value = message.get("value")
        if not isinstance(value, str) or (position % 2 and not value.strip()):
            raise InputError(f"{where}: message {position} has no text.")
        texts.append(value)
    if len(texts) % 2 or not texts:
        raise InputError(f"{where}: the last question has no answer.")
    if "image" in record and not isinstance(record["image"], str):
        raise InputError(f'{where}: "image" is not the name of a file.')
    row = {"id": name, "image": record.get("image"), "texts": texts, "fault": None}
    for key in ("families", "kinds"):
        given = record.get(key) or None
        if given is not None and (not isinstance(given, list) or 2 * len(given) != len(texts)):
            raise InputError(f'{where}: "{key}" is no list with one entry per question.')
        row[key] = given
    row["scene"] = json.dumps(record["scene"]) if "scene" in record else None
    return row
