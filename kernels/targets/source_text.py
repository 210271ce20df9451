"""Rewritten functions as text: what did not change stays as it was written, comments included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

_INDENT = "    "
_WIDTH = 100


def annotate(tree: ast.FunctionDef, lines: Sequence[str]) -> None:
    """Note on statements and parameters how they are written.

    `above`: blank and comment lines over a statement. `behind`: the comment at the end of a line.
    `written`: the lines of a statement, beside `unparsed`, by which a change is seen.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            # "or None" is decided: what is left is there.
            node.behind = _behind(lines, node).partition(" or None")[0]  # type: ignore[attr-defined]
        elif isinstance(node, ast.stmt):
            first = node.lineno - 1
            while first > 0 and lines[first - 1].strip().partition("#")[0] == "":
                first -= 1
            node.above = [line.strip() for line in lines[first : node.lineno - 1]]  # type: ignore[attr-defined]
            head = {ast.If: "test", ast.For: "iter"}.get(type(node))
            node.behind = _behind(lines, getattr(node, head) if head else node)  # type: ignore[attr-defined]
            written = lines[node.lineno - 1 : node.end_lineno]
            node.written = [line[node.col_offset :] for line in written]  # type: ignore[attr-defined]
            node.unparsed = ast.unparse(node)  # type: ignore[attr-defined]


def printed(tree: ast.FunctionDef) -> str:
    """A function without its decorators."""
    arguments = [(ast.unparse(node), getattr(node, "behind", "")) for node in tree.args.args]
    if any(comment for _, comment in arguments):
        inside = [f"{_INDENT}{text},{_spaced(comment)}" for text, comment in arguments]
        head = [f"def {tree.name}(", *inside, "):"]
    else:
        head = [f"def {tree.name}({', '.join(text for text, _ in arguments)}):"]
    return "\n".join([*head, *_lines(tree.body, _INDENT)])


def _lines(statements: Sequence[ast.stmt], indent: str) -> Iterator[str]:
    for node in statements:
        for line in [*getattr(node, "above", []), *_statement(node)]:
            yield from _fitted(f"{indent}{line}".rstrip())


def _statement(node: ast.stmt) -> Iterator[str]:
    behind = _spaced(getattr(node, "behind", ""))
    if isinstance(node, ast.If | ast.For):
        if isinstance(node, ast.If):
            yield f"if {_text(node.test)}:{behind}"
        else:
            yield f"for {_text(node.target)} in {_text(node.iter)}:{behind}"
        yield from _lines(node.body, _INDENT)
        if node.orelse:
            yield "else:"
            yield from _lines(node.orelse, _INDENT)
    elif getattr(node, "unparsed", "") == ast.unparse(node):
        yield from node.written  # type: ignore[attr-defined]
    else:
        yield f"{_text(node)}{behind}"


def _fitted(line: str) -> list[str]:
    """A line, or three where it is too long: up to the opening parenthesis, inside, the rest."""
    match = re.fullmatch(r"(\s*)(.*? = [\w.]+\()(.*)\)", line)
    if len(line) <= _WIDTH or match is None:
        return [line]
    indent, opening, inside = match.groups()
    return [f"{indent}{opening}", f"{indent}{_INDENT}{inside}", f"{indent})"]


def _text(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if '"' in text else text.replace("'", '"')


def _spaced(comment: str) -> str:
    return f"  {comment}" if comment else ""


def _behind(lines: Sequence[str], node: ast.expr | ast.stmt | ast.arg) -> str:
    end = (node.end_lineno or node.lineno) - 1
    rest = lines[end].encode()[node.end_col_offset or 0 :].decode()
    before, mark, comment = rest.partition("#")
    return mark + comment if before.strip(" ,:)") == "" else ""
