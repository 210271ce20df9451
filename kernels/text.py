"""Lines of generated source: what is read in them, what can go, and how they fit a page."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

__all__ = ["WIDTH", "fitted", "without_unused", "words", "wrapped"]

WIDTH = 100


def words(text: str) -> set[str]:
    """Names in a text, comments aside."""
    return set(re.findall(r"[A-Za-z_]\w*", re.sub(r"#.*", "", text)))


def without_unused(lines: list[str]) -> list[str]:
    """Without values that nothing reads; nothing that is assigned has another effect."""
    assignment = re.compile(r"\s*(\w+)(: tl\.constexpr)? = ")
    while True:
        kept = []
        for index, line in enumerate(lines):
            match = assignment.match(line)
            if match and _is_statement(line):
                rest = "\n".join(lines[:index] + lines[index + 1 :])
                if match[1] not in words(rest):
                    continue
            kept.append(line)
        if kept == lines:
            return lines
        lines = kept


def _is_statement(line: str) -> bool:
    try:
        ast.parse(line.strip())
    except SyntaxError:
        return False
    return True


def fitted(line: str) -> list[str]:
    """A line, or three where it is too long: up to the opening parenthesis, inside, the rest."""
    match = re.fullmatch(r"(\s*)(.*? = [\w.]+\()(.*)\)", line)
    if len(line) <= WIDTH or match is None:
        return [line]
    indent, opening, inside = match.groups()
    return [f"{indent}{opening}", f"{indent}    {inside}", f"{indent})"]


def wrapped(items: Sequence[str], between: str, indent: str) -> str:
    """Items on lines of the width of a page, broken between items only."""
    lines = [indent]
    for index, item in enumerate(items):
        text = item + between * (index + 1 < len(items))
        if len(lines[-1]) + len(text.rstrip()) > WIDTH and lines[-1] != indent:
            lines.append(indent)
        lines[-1] += text
    return "\n".join(line.rstrip() for line in lines if line.strip())
