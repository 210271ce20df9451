"""YAML and JSON that anyone may have written, read within limits.

A document has a limited size, depth and number of nodes, plain tags, and no aliases: what is read
is never much larger than its file, and reading takes a second at most. No number is NaN, and no
integer has more than 64 bits. YAML, which people write, has no key twice; JSON may be by programs
that take the last.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from typing_extensions import override

from planner.files import MEBIBYTE, read_text
from planner.ir.errors import InputError

T = TypeVar("T")

_MOST_BYTES = 8 * MEBIBYTE
_MOST_EVENTS = 100_000
_DEEPEST = 50

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What PyYAML guesses from the look of a plain word. Dates are left as text.
_GUESSED = ("bool", "float", "int", "null")


class _PlainLoader(_Loader):  # type: ignore[misc]
    """Reads words, numbers, lists and mappings, and nothing else."""

    yaml_implicit_resolvers = {
        first: [(tag, look) for tag, look in guesses if tag.rpartition(":")[2] in _GUESSED]
        for first, guesses in _Loader.yaml_implicit_resolvers.items()
    }

    @override
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        made = super().construct_mapping(node, deep)
        if len(made) < len(node.value):
            raise _TwiceError.of(key.value for key, _ in node.value)
        return made


class _TwiceError(Exception):
    """A key that a mapping has twice."""

    @staticmethod
    def of(keys: Iterable[str]) -> _TwiceError:
        return _TwiceError(Counter(keys).most_common(1)[0][0])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _TwiceError.of(key for key, _ in pairs)
    return made


class _PlainDumper(yaml.SafeDumper):
    """Writes a value that occurs twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_yaml(document: Any) -> str:
    """YAML that `parse_yaml` reads back; keys stay in their order."""
    return yaml.dump(document, Dumper=_PlainDumper, sort_keys=False, width=100)


def parse_yaml(text: str, what: str) -> Any:
    """Read one YAML document; InputError where it is none, or beyond the limits.

    `what`: it is, for messages: ``the plan 'plan.yaml'``.
    """
    try:
        _check_yaml(text, what)
        document = yaml.load(text, Loader=_PlainLoader)
    except _TwiceError as key:
        raise InputError(f"{what} has the key {key} twice") from None
    # ValueError: a number of more digits than Python reads.
    except (yaml.YAMLError, ValueError):
        raise InputError(f"{what} is truncated or not YAML") from None
    _check_contents(document, what)
    return document


def _check_yaml(text: str, what: str) -> None:
    """Refuse a document by the events of its parser, before anything is built of them."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST or number > _MOST_EVENTS:
            raise InputError(f"{what} is nested too deeply or has too many entries")
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"{what} has the alias *{event.anchor}: aliases are not read")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise InputError(f"{what} has the tag {tag}: tags are not read")


def parse_json(text: str, what: str, by_people: bool = False) -> Any:
    """Read one JSON document; InputError where it is none, or beyond the limits.

    `what`: it is, for messages: ``the config.json of 'llava'``. `by_people`: no key may be twice.
    """
    if sum(map(text.count, ",[{")) > _MOST_EVENTS:
        raise InputError(f"{what} has too many entries")
    try:
        document = json.loads(text, object_pairs_hook=_once if by_people else None)
    except _TwiceError as key:
        raise InputError(f"{what} has the key {key} twice") from None
    except RecursionError:
        raise InputError(f"{what} is nested too deeply") from None
    except ValueError:
        raise InputError(f"{what} is truncated or not JSON") from None
    _check_contents(document, what)
    return document


def _check_contents(document: Any, what: str) -> None:
    """Refuse numbers that nothing here computes with, and deep nesting."""
    level = [document]
    for _ in range(_DEEPEST):
        for value in level:
            if isinstance(value, float) and math.isnan(value):
                raise InputError(f"{what} holds NaN, which is no number")
            if isinstance(value, int) and abs(value) >> 63:
                raise InputError(f"{what} holds an integer of more than 64 bits")
        lists = [value for value in level if isinstance(value, list)]
        lists += [[*value, *value.values()] for value in level if isinstance(value, dict)]
        level = [item for items in lists for item in items]
    if level:
        raise InputError(f"{what} is nested too deeply")


def digest_of(facts: Any) -> str:
    """Tells facts apart, which may be of any types: SHA-256 of them as JSON, 64 digits."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def signed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document for a YAML file as its reader will see it, with a ``digest`` of all the rest."""
    readable: dict[str, Any] = parse_yaml(dump_yaml(document), "the document")
    return {**readable, "digest": signature(readable)}


def check_signed(document: Mapping[str, Any], path: Path, what: str) -> None:
    """Raise InputError where a document was changed after it was `signed`, or holds none.

    `what`: it should be, for messages: ``plan``.
    """
    try:
        digest = signature(document)
    # Keys of several types in one mapping.
    except TypeError:
        raise InputError(f"the {what} '{path}' is broken: a key is not text") from None
    if document.get("digest") != digest:
        raise InputError(
            f"the {what} '{path}' was changed after it was written (its digest does not match): "
            "compile it again"
        )


def signature(document: Mapping[str, Any]) -> str:
    """A digest, 16 digits, of a document without its ``digest``."""
    return digest_of({key: value for key, value in document.items() if key != "digest"})[:16]


def read_yaml(path: Path, what: str) -> Any:
    """Read a file of YAML; InputError where it cannot be read, is none, or beyond the limits.

    `what`: it should be, for messages: ``plan``.
    """
    return parse_yaml(read_text(path, what, _MOST_BYTES), f"the {what} '{path}'")


def read_json(path: Path, what: str) -> Any:
    """Read a file of JSON; see `read_yaml`."""
    return parse_json(read_text(path, what, _MOST_BYTES), f"the {what} '{path}'")


def of_format(document: Any, key: str, number: int, path: Path, what: str) -> dict[str, Any]:
    """A document of planner's own without its key; InputError unless that says format `number`.

    `what`: it should be, for messages: ``plan``.
    """
    if not isinstance(document, dict) or key not in document:
        raise InputError(f"'{path}' is not a {what} of planner")
    if document[key] != number:
        raise InputError(
            f"the {what} '{path}' has format {document[key]}, this planner reads {number}"
        )
    return {name: value for name, value in document.items() if name != key}


def validated(schema: type[T], document: Any, what: str) -> T:
    """A document as a pydantic model or dataclass; InputError names its first fault."""
    try:
        return TypeAdapter(schema).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise InputError(f"{what} is broken at {where}: {first['msg'].lower()}") from None
