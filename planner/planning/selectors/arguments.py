"""Methods with parameters as text: ``name:field=value,field=value``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from math import inf
from sys import float_info
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_type_hints

from planner.ir.errors import InputError


@dataclass(frozen=True)
class Within:
    """The numbers that an argument takes, and what to call them in messages."""

    least: float
    most: float
    wanted: str


Share = Annotated[float, Within(0, 1, "a share from 0 to 1")]
Part = Annotated[float, Within(float_info.min, 1, "a share above 0, up to 1")]
Positive = Annotated[float, Within(float_info.min, inf, "more than 0")]
NotNegative = Annotated[float, Within(0, inf, "0 or more")]
Count = Annotated[int, Within(0, inf, "a count from 0 on")]
Several = Annotated[int, Within(1, inf, "a count from 1 on")]
Layer = Annotated[int, Within(0, inf, "a layer from 0 on")]


@cache
def _ranges(kind: type[Any]) -> dict[str, Within]:
    """Field -> the numbers that it takes, where its type says so."""
    hints = get_type_hints(kind, include_extras=True)
    parts = [(name, part) for name, hint in hints.items() for part in (hint, *get_args(hint))]
    known = ((name, note) for name, part in parts for note in getattr(part, "__metadata__", ()))
    return {name: note for name, note in known if isinstance(note, Within)}


# type of a field -> how its text is read, and what to call it in messages
_READERS: Mapping[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "a whole number"),
    float: (float, "a number"),
    bool: (lambda text: {"true": True, "false": False}[text], "true or false"),
    str: (str, "a word"),
    tuple[float, ...]: (lambda t: tuple(map(float, t.split("/"))), "numbers such as 0.5/0.25"),
    tuple[int, ...]: (lambda t: tuple(map(int, t.split("/"))), "whole numbers such as 300/200/110"),
}


def _write(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return str(value)


@dataclass(frozen=True)
class Arguments:
    """A frozen dataclass that is read from, and written as, ``name:field=value,...``.

    Its fields are of the types int, float, bool, str or a tuple of int or of float (written
    ``300/200/110``), or of one of these and None, where None is the default. A type may say what
    numbers it takes: `Share`, `Count`.
    """

    name: ClassVar[str]
    # Arguments that the text form has at least.
    shown: ClassVar[int] = 0
    # The argument whose name may be left out, "" for none.
    leading: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field, known in _ranges(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, field)
            self.check(field, value is None or known.least <= value <= known.most, known.wanted)

    @classmethod
    def read(cls, arguments: Mapping[str, str]) -> Self:
        """Build from the fields' texts; InputError on an unknown, missing or malformed field."""
        hints = get_type_hints(cls)
        known = {entry.name: entry for entry in fields(cls)}
        values: dict[str, Any] = {}
        for field, text in arguments.items():
            if field not in known:
                listed = ", ".join(known) or "none"
                raise InputError(f"{cls.name} has no field '{field}'; its fields: {listed}.")
            hint = hints[field]
            reader, wanted = _READERS[hint if hint in _READERS else get_args(hint)[0]]
            try:
                values[field] = reader(text)
            except (ValueError, KeyError):
                raise InputError(
                    f"{cls.name}:{field}={text} cannot be read: {field} is {wanted}."
                ) from None
        for field, entry in known.items():
            if entry.default is MISSING and field not in values:
                raise InputError(f"{cls.name} needs {field}, as in {cls.name}:{field}=144.")
        return cls(**values)

    def __str__(self) -> str:
        """The text form without fields at their defaults; it reads back as an equal object."""
        known = {entry: getattr(self, entry.name) for entry in fields(self)}
        shown = [entry for entry, value in known.items() if value != entry.default]
        if not shown:
            first = sorted(known, key=lambda entry: entry.kw_only is True)
            shown = [entry for entry in first if known[entry] is not None][: self.shown]
        texts = [f"{entry.name}={_write(known[entry])}" for entry in shown]
        return ":".join([self.name, ",".join(texts)] if texts else [self.name])

    def check(self, field: str, good: bool, wanted: str) -> None:
        """Raise InputError unless the field's value is good; for ``__post_init__``."""
        if not good:
            text = _write(getattr(self, field))
            raise InputError(f"{self.name}:{field}={text} is out of range: {field} is {wanted}.")


T = TypeVar("T", bound=Arguments)


def read_named(text: str, registry: Mapping[str, type[T]], what: str) -> T:
    """Read ``name:field=value,...`` as one of a registry; InputError says what is wrong."""
    name, _, rest = text.strip().partition(":")
    if name not in registry:
        raise InputError(f"There is no {what} '{name}'; known: {', '.join(registry)}.")
    arguments: dict[str, str] = {}
    for part in rest.split(",") if rest else ():
        field, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and not arguments and registry[name].leading:
            field, equals, value = registry[name].leading, "=", field
        if not equals or not field or not value:
            raise InputError(f"'{text}' is not of the form {name}:field=value,field=value.")
        if field in arguments:
            raise InputError(f"'{text}' gives {field} twice.")
        arguments[field] = value
    return registry[name].read(arguments)
