"""A kernel's source with some of its parameters known: constants named, dead branches gone.

Enters: a ``@triton.jit`` function, and what is known of its parameters. Leaves: source text that
reads like the original, comments included: known parameters are constants at the top of the body,
branches that cannot be taken are left out, loads from tables with known contents are computed. So
the kernel library stays the one definition of every kernel; `planner.kernels.codegen` makes files
of what is returned here.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from triton.runtime.jit import JITFunction

from planner.kernels.tables import Table
from planner.kernels.text import fitted, without_unused, words

__all__ = ["Function", "Program"]


@dataclass(frozen=True)
class Function:
    """One specialised function.

    Attributes:
        name: in the file.
        parameters: those that are left, in order.
        source: text, decorator included.
    """

    name: str
    parameters: tuple[str, ...]
    source: str


@dataclass
class Program:
    """The functions of one file: kernels, and the device functions that they need."""

    functions: dict[str, Function] = field(default_factory=dict)
    _made: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def add(
        self,
        function: JITFunction,
        known: Mapping[str, Any],
        *,
        programs: Mapping[int, int] = MappingProxyType({}),
        generic: Iterable[str] = (),
    ) -> Function:
        """Specialise a function, and what it calls, into the file.

        Args:
            function: a kernel or a device function.
            known: by parameter name: a number, text, None, or a `Table`.
            programs: axis -> the only program there.
            generic: parameters of which no value is to be compiled in by Triton itself.
        """
        key = (function, tuple(sorted(known.items(), key=lambda item: item[0])), *programs.items())
        if key not in self._made:
            name = function.fn.__name__
            taken = sum(n == name or n.startswith(f"{name}_v") for n in self.functions)
            name = f"{name}_v{taken + 1}" if taken else name
            # What is called is added on the way, so it stands in front.
            made = _Specialiser(self, function, known, programs, tuple(generic)).function(name)
            self.functions[name], self._made[key] = made, name
        return self.functions[self._made[key]]

    def add_table(self, table: Table) -> str:
        """The name of the device function that computes a table's entries."""
        self.functions.setdefault(table.name, Function(table.name, ("slot",), table.source))
        return table.name

    @property
    def source(self) -> str:
        """All functions, callees first."""
        return "\n\n".join(function.source for function in self.functions.values())


_UNKNOWN = object()
_BINARY: Mapping[type, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
        ast.Div: operator.truediv,
    }
)
_COMPARE: Mapping[type, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Lt: operator.lt,
        ast.LtE: operator.le,
        ast.Gt: operator.gt,
        ast.GtE: operator.ge,
        ast.Is: operator.is_,
        ast.IsNot: operator.is_not,
    }
)


class _Specialiser:
    """Renders one function. `names` holds the known values of parameters and of locals."""

    def __init__(
        self,
        program: Program,
        function: JITFunction,
        known: Mapping[str, Any],
        programs: Mapping[int, int],
        generic: tuple[str, ...],
    ) -> None:
        self.program, self.function_, self.programs = program, function, programs
        self.names: dict[str, Any] = dict(known)
        self.generic = {*(function.do_not_specialize or ()), *generic}
        self.lines = textwrap.dedent(inspect.getsource(function.fn)).splitlines()
        (tree,) = ast.parse("\n".join(self.lines)).body
        assert isinstance(tree, ast.FunctionDef)
        self.tree = tree
        stores = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and _is_store(n)]
        # A name that is bound once, outside loops, may be a constant.
        looped = {
            n.id
            for loop in ast.walk(tree)
            if isinstance(loop, ast.For)
            for n in ast.walk(loop)
            if isinstance(n, ast.Name) and _is_store(n)
        }
        self.once = {name for name in stores if stores.count(name) == 1} - looped
        # Locals that say where a plan's survivors end.
        self.ends: set[str] = set()

    # -- the function -------------------------------------------------------------------------

    def function(self, name: str) -> Function:
        doc, *body = self.tree.body
        written = [*self.body(body, doc.end_lineno or doc.lineno)]
        known = {n: v for n, v in self.names.items() if _is_number(v)}
        parameters = [a.arg for a in self.tree.args.args]
        header = [f"    {n}: tl.constexpr = {known[n]!r}" for n in parameters if n in known]
        lines = [part for line in without_unused([*header, *written]) for part in fitted(line)]
        used = words("\n".join(lines))
        kept = [p for p in parameters if p not in self.names and p in used]
        head = self.lines[doc.lineno - 1 : doc.end_lineno]
        text = "\n".join([self.signature(name, kept), *head, *lines])
        return Function(name, tuple(kept), f"{self.decorator(kept)}\n{text}\n")

    def decorator(self, kept: Sequence[str]) -> str:
        generic = [p for p in kept if p in self.generic]
        names = ", ".join(f'"{p}"' for p in generic)
        return f"@triton.jit(do_not_specialize=[{names}])" if generic else "@triton.jit"

    def signature(self, name: str, kept: Sequence[str]) -> str:
        arguments = self.tree.args.args
        if len({a.lineno for a in arguments}) < len(arguments) or len(arguments) == 1:
            return f"def {name}({', '.join(kept)}):"
        lines = [self.lines[a.lineno - 1] for a in arguments if a.arg in kept]
        # What is left is not None.
        return "\n".join(
            [f"def {name}(", *(re.sub(" or None.*", "", line) for line in lines), "):"]
        )

    # -- statements ---------------------------------------------------------------------------

    def body(self, statements: Sequence[ast.stmt], above: int) -> Iterator[str]:
        """Lines of consecutive statements; `above` is the last line before them."""
        for statement in statements:
            comments = self.lines[above : statement.lineno - 1]
            above = statement.end_lineno or statement.lineno
            lines = [*self.statement(statement)]
            if lines:
                yield from comments
                yield from lines
            if self.returns(statement):
                return

    def returns(self, node: ast.stmt) -> bool:
        """Whether nothing behind a statement is reached."""
        if not isinstance(node, ast.If):
            return isinstance(node, ast.Return)
        test = self.value(node.test)
        chosen = node.body if test else node.orelse
        return test is not _UNKNOWN and bool(chosen) and self.returns(chosen[-1])

    def statement(self, node: ast.stmt) -> Iterator[str]:
        if isinstance(node, ast.If):
            yield from self.branch(node)
        elif isinstance(node, ast.For):
            yield from self.clause(node, node.iter, node.body)
        elif hasattr(node, "body"):
            raise self.unsupported(node, type(node).__name__.lower())
        elif not self.is_dropped(node):
            value = _UNKNOWN
            name = _target(node)
            if name in self.once and getattr(node, "value", None) is not None:
                value = self.value(node.value)  # type: ignore[attr-defined]
            if name and self.reads_end(node):
                self.ends.add(name)
            if _is_number(value):
                self.names[name] = value
                yield f"{' ' * node.col_offset}{name}: tl.constexpr = {value!r}"
            elif name in self.once and value is not _UNKNOWN:
                self.names[name] = value
            else:
                yield from self.whole(node).splitlines()

    def unsupported(self, node: ast.stmt, what: str) -> NotImplementedError:
        """No kernel has needed this yet."""
        name, line = self.tree.name, node.lineno
        return NotImplementedError(f"{name}, line {line}: '{what}' cannot be specialised")

    def is_dropped(self, node: ast.stmt) -> bool:
        """Whether a statement moves a pointer that is gone, or adds nothing."""
        if isinstance(node, ast.AugAssign):
            return _target(node) in self.names or self.value(node.value) == 0
        return False

    def branch(self, node: ast.If) -> Iterator[str]:
        test = self.value(node.test)
        if test is _UNKNOWN:
            if self.is_guard(node):
                return
            lines = [*self.clause(node, node.test, node.body)]
            yield from lines
            if node.orelse:
                if node.orelse[0].col_offset == node.col_offset or not lines:
                    raise self.unsupported(node.orelse[0], "elif" if lines else "else alone")
                yield f"{' ' * node.col_offset}else:"
                yield from self.body(node.orelse, node.orelse[0].lineno - 1)
            return
        chosen = node.body if test else node.orelse
        if chosen:
            shift = chosen[0].col_offset - node.col_offset
            above = node.test.end_lineno if test else chosen[0].lineno - 1
            for line in self.body(chosen, above or 0):
                yield line[shift:]

    def is_guard(self, node: ast.If) -> bool:
        """Whether a statement ends programs beyond a plan's survivors: there are none."""
        return (
            isinstance(node.body[0], ast.Return)
            and isinstance(node.test, ast.Compare)
            and isinstance(node.test.ops[0], ast.GtE)
            and self.reads_end(node.test.comparators[0])
        )

    def reads_end(self, node: ast.AST) -> bool:
        """Whether something is computed from the number of a plan's survivors."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id in self.ends:
                return True
            if isinstance(part, ast.Name) and isinstance(self.names.get(part.id), Table):
                return self.names[part.id].constant is not None
        return False

    def clause(self, node: ast.For | ast.If, head: ast.expr, body: list[ast.stmt]) -> Iterator[str]:
        """A loop or branch, unless nothing of its body is left."""
        first, last = node.lineno, head.end_lineno or node.lineno
        inside = [*self.body(body, last)]
        if inside:
            line = "\n".join(self.lines[first - 1 : last])
            old = ast.get_source_segment("\n".join(self.lines), head) or ""
            yield from line.replace(old, self.text(head)).splitlines()
            yield from inside

    def whole(self, node: ast.stmt) -> str:
        """A statement and the comment behind it."""
        behind = self.lines[(node.end_lineno or 1) - 1][node.end_col_offset or 0 :]
        return " " * node.col_offset + self.text(node) + behind

    # -- expressions --------------------------------------------------------------------------

    def text(self, node: ast.AST) -> str:
        """Source of an expression or simple statement, as far as it is not known."""
        if isinstance(node, ast.IfExp) and self.value(node.test) is not _UNKNOWN:
            return self.text(node.body if self.value(node.test) else node.orelse)
        if isinstance(node, ast.BinOp):
            zeros = [self.value(node.left) == 0, self.value(node.right) == 0]
            if isinstance(node.op, ast.Mult) and any(zeros):
                return "0"
            if isinstance(node.op, ast.Add) and any(zeros):
                return self.text(node.left if zeros[1] else node.right)
        if isinstance(node, ast.Call):
            called = self.call(node)
            if called is not None:
                return called
        return self.spliced(node)

    def spliced(self, node: ast.AST) -> str:
        """Source of a node with the texts of its parts put in."""
        source = "\n".join(self.lines)
        starts = [0]
        for line in self.lines:
            starts.append(starts[-1] + len(line.encode()) + 1)
        encoded = source.encode()

        def offset(line: int, column: int) -> int:
            return starts[line - 1] + column

        begin = offset(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        end = offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        pieces, done = [], begin
        for child in sorted(_parts(node), key=lambda part: (part.lineno, part.col_offset)):
            start = offset(child.lineno, child.col_offset)
            stop = offset(child.end_lineno or 0, child.end_col_offset or 0)
            text = self.text(child)
            enclosed = encoded[start - 1 : start] + encoded[stop : stop + 1] == b"()"
            if enclosed and not isinstance(node, ast.Call) and _is_atom(text):
                # A sum of which one term is left needs its parentheses no more.
                start, stop = start - 1, stop + 1
            pieces += [encoded[done:start].decode(), text]
            done = stop
        return "".join([*pieces, encoded[done:end].decode()])

    def call(self, node: ast.Call) -> str | None:
        """A call that is known or changes; None where it is to be written as it is."""
        value = self.value(node)
        if _is_number(value):
            return repr(value)
        callee = self.callee(node)
        if callee is not None:
            return self.device_call(node, callee)
        found = self.table_of(node)
        if found is None:
            return None
        table, index = found
        return index if table.is_identity else f"{self.program.add_table(table)}({index})"

    def callee(self, node: ast.Call) -> JITFunction | None:
        if isinstance(node.func, ast.Name):
            found = self.function_.fn.__globals__.get(node.func.id)
            return found if isinstance(found, JITFunction) else None
        return None

    def device_call(self, node: ast.Call, callee: JITFunction) -> str:
        """A call of a device function, without the arguments that are known."""
        known = {}
        for parameter, argument in zip(callee.params, node.args, strict=True):
            value = self.value(argument)
            fixed = parameter.is_constexpr or isinstance(value, Table)
            if fixed and value is not _UNKNOWN:
                known[parameter.name] = value
        made = self.program.add(callee, known)
        kept = [
            self.text(argument)
            for parameter, argument in zip(callee.params, node.args, strict=True)
            if parameter.name in made.parameters
        ]
        return f"{made.name}({', '.join(kept)})"

    def table_of(self, node: ast.Call) -> tuple[Table, str] | None:
        """(table, text of the index) where a call loads from a known table."""
        if ast.unparse(node.func) != "tl.load":
            return None
        terms = [*_terms(node.args[0])]
        for pointer in terms:
            table = self.names.get(pointer.id) if isinstance(pointer, ast.Name) else None
            if isinstance(table, Table):
                rest = [t for t in terms if t is not pointer and self.value(t) != 0]
                return table, " + ".join(self.text(term) for term in rest) or "0"
        return None

    def value(self, node: ast.AST) -> Any:
        """What an expression is, where that is known."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.names.get(node.id, _UNKNOWN)
        if isinstance(node, ast.IfExp):
            test = self.value(node.test)
            return test if test is _UNKNOWN else self.value(node.body if test else node.orelse)
        if isinstance(node, ast.BinOp):
            left, right = self.value(node.left), self.value(node.right)
            if isinstance(node.op, ast.Mult) and (left == 0 or right == 0):
                return 0
            if _is_number(left) and _is_number(right) and type(node.op) in _BINARY:
                return _BINARY[type(node.op)](left, right)
        if isinstance(node, ast.BoolOp):
            values = [self.value(part) for part in node.values]
            decisive = isinstance(node.op, ast.Or)
            if any(v is not _UNKNOWN and bool(v) is decisive for v in values):
                return decisive
            return _UNKNOWN if any(v is _UNKNOWN for v in values) else not decisive
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self.value(node.left), self.value(node.comparators[0])
            if isinstance(node.ops[0], ast.Is | ast.IsNot) and left is _UNKNOWN:
                # What is not known to be None is a tensor.
                left = node.left
            if _UNKNOWN not in (left, right) and type(node.ops[0]) in _COMPARE:
                return _COMPARE[type(node.ops[0])](left, right)
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function == "tl.program_id":
                return self.programs.get(self.value(node.args[0]), _UNKNOWN)
            if function == "tl.cdiv":
                size, part = (self.value(argument) for argument in node.args)
                return -(-size // part) if _is_number(size) and _is_number(part) else _UNKNOWN
            found = self.table_of(node) if function == "tl.load" else None
            if found is not None and found[0].constant is not None:
                return found[0].constant
        return _UNKNOWN


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _is_store(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _target(node: ast.stmt) -> str:
    """The one name that a statement binds, or ""."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    (target, *more) = targets
    return target.id if isinstance(target, ast.Name) and not more else ""


def _terms(node: ast.expr) -> Iterator[ast.expr]:
    """What a sum adds up."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _terms(node.left)
        yield from _terms(node.right)
    else:
        yield node


def _parts(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions directly inside a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        elif isinstance(child, ast.keyword):
            yield child.value


def _is_atom(text: str) -> bool:
    """Whether a text is a name, a number or a call, so that it binds tighter than any operator."""
    try:
        return isinstance(ast.parse(text, mode="eval").body, ast.Name | ast.Call | ast.Constant)
    except SyntaxError:
        return False
