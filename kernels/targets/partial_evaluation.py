"""A kernel's source with some of its parameters known.

The text stands alone and reads like the original, comments included: known parameters are constants
at the top of the body, branches that cannot be taken are left out, loads from tables of known
contents are computed. The kernels of planner thus stay the one definition.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import triton.language as tl
from triton.runtime.jit import JITFunction
from typing_extensions import override

from planner.kernels.targets.source_text import annotate, printed
from planner.kernels.targets.tables import Table

_UNKNOWN = object()


@dataclass(frozen=True)
class Specialised:
    """One function of a `Program`, with the parameters that are left; its source has decorators."""

    name: str
    parameters: tuple[str, ...]
    source: str


@dataclass
class Program:
    """A specialised kernel, behind the device functions that it calls."""

    functions: dict[str, Specialised] = field(default_factory=dict)
    _made: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def add(
        self,
        function: JITFunction,
        known: Mapping[str, Any],
        single: int | None = None,
        generic: Collection[str] = (),
    ) -> Specialised:
        """Specialise a kernel or a device function, and what it calls.

        Args:
            known: by parameter name: a number, text, None, or a `Table`.
            single: axis of the grid that has a single program.
            generic: parameters of which Triton is not to compile in any value, besides those that
                the function names.

        Raises NotImplementedError: the function is written in a way that no kernel has needed yet.
        """
        key = (function, single, *sorted(known.items(), key=lambda item: item[0]))
        if key not in self._made:
            name = function.fn.__name__
            alike = sum(n == name or n.startswith(f"{name}_v") for n in self.functions)
            name = f"{name}_v{alike + 1}" if alike else name
            # What is called is added on the way, so it stands in front.
            made = self._specialised(name, function, known, single, generic)
            self.functions[name], self._made[key] = made, name
        return self.functions[self._made[key]]

    def add_table(self, table: Table) -> str:
        """The name of the device function that computes a table's entries."""
        made = Specialised(table.function, ("index",), table.source)
        self.functions.setdefault(table.function, made)
        return table.function

    @property
    def source(self) -> str:
        """All functions, callees first."""
        return "\n\n".join(function.source for function in self.functions.values())

    def _specialised(
        self,
        name: str,
        function: JITFunction,
        known: Mapping[str, Any],
        single: int | None,
        generic: Collection[str],
    ) -> Specialised:
        lines = textwrap.dedent(inspect.getsource(function.fn)).splitlines()
        (tree,) = ast.parse("\n".join(lines)).body
        assert isinstance(tree, ast.FunctionDef)
        annotate(tree, lines)
        tree.name = name
        documented = ast.get_docstring(tree) is not None
        document, body = tree.body[:documented], tree.body[documented:]
        rewriter = _Rewriter(self, function, tree, known, single)
        body = rewriter.block(body)
        for each in ast.walk(ast.Module(body, [])):
            if isinstance(each, ast.Name) and isinstance(rewriter.names.get(each.id), Table):
                raise rewriter.unsupported(each, f"only loads can read '{each.id}', a table")
        constants = [_constant(n, value) for n, value in known.items() if _is_plain(value)]
        body = _pruned([*constants, *body])
        read = _read(body)
        tree.args.args = [a for a in tree.args.args if a.arg in read and a.arg not in known]
        tree.body = [*document, *body]
        parameters = tuple(argument.arg for argument in tree.args.args)
        generic = {*generic, *(function.do_not_specialize or ())}
        names = ", ".join(f'"{parameter}"' for parameter in parameters if parameter in generic)
        decorator = f"@triton.jit(do_not_specialize=[{names}])" if names else "@triton.jit"
        return Specialised(name, parameters, f"{decorator}\n{printed(tree)}\n")


class _Rewriter(ast.NodeTransformer):
    """Puts what is known into a function; `names` holds known values of parameters and locals."""

    def __init__(
        self,
        program: Program,
        function: JITFunction,
        tree: ast.FunctionDef,
        known: Mapping[str, Any],
        single: int | None,
    ) -> None:
        self.program, self.globals, self.single = program, function.fn.__globals__, single
        self.title, self.names = tree.name, dict(known)
        parameters = {argument.arg for argument in tree.args.args}
        bound = _bound(tree)
        self.own = {*bound, *parameters}
        # A local that is bound once, outside loops, may be a constant.
        self.once = {name for name in bound if bound.count(name) == 1} - parameters
        self.once -= {
            name for loop in ast.walk(tree) if isinstance(loop, ast.For) for name in _bound(loop)
        }

    # Statements: a list, or None where nothing is left.

    def block(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        """What is left of consecutive statements, up to where the function is left."""
        made: list[ast.stmt] = []
        for statement in statements:
            new = self.visit(statement)
            made += new if isinstance(new, list) else [new] if new is not None else []
            if made and isinstance(made[-1], ast.Return):
                break
        return made

    @override
    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.While | ast.With | ast.Try | ast.FunctionDef | ast.Match):
            raise self.unsupported(node, f"'{type(node).__name__.lower()}' cannot be specialised")
        return super().visit(node)

    def unsupported(self, node: ast.stmt | ast.expr, what: str) -> NotImplementedError:
        """No kernel has needed this yet."""
        return NotImplementedError(f"{self.title}, line {node.lineno}: {what}")

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.visit(node.test)
        test = _known(node.test)
        if test is _UNKNOWN:
            node.body, node.orelse = self.block(node.body), self.block(node.orelse)
            if not node.body and node.orelse:
                node.test = ast.UnaryOp(ast.Not(), node.test)
                node.body, node.orelse = node.orelse, []
            return node if node.body else None
        chosen = self.block(node.body if test else node.orelse)
        if chosen:
            chosen[0].above = [*node.above, *chosen[0].above]  # type: ignore[attr-defined]
        return chosen

    def visit_For(self, node: ast.For) -> Any:
        node.iter, node.body = self.visit(node.iter), self.block(node.body)
        return node if node.body else None

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign) -> Any:
        assert node.value is not None
        node.value = self.visit(node.value)
        name, value = _target(node), _known(node.value)
        if name not in self.once or value is _UNKNOWN:
            return node
        self.names[name] = value
        if not _is_plain(value):
            return None
        made = _constant(name, value)
        made.above, made.behind = node.above, node.behind  # type: ignore[attr-defined, union-attr]
        return made

    visit_AnnAssign = visit_Assign

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        node.value = self.visit(node.value)
        if _known(node.value) == 0:
            return None
        if _target(node) in self.names:
            raise self.unsupported(node, f"'{_target(node)}' is known and changes")
        return node

    # Expressions: what is left of one. Where its value is known, the node carries it as `known`,
    # and is still printed as it was written, by the names of constants.

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.names:
            value = self.names[node.id]
            return ast.Constant(None) if value is None else _knowing(node, value)
        if node.id not in self.own:
            value = self.globals.get(node.id)
            value = value.value if isinstance(value, tl.constexpr) else value
            if _is_plain(value):
                return ast.Constant(value)
            if isinstance(value, JITFunction):
                return ast.Name(self.program.add(value, {}).name, ast.Load())
        return node

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        node.test = self.visit(node.test)
        test = _known(node.test)
        if test is _UNKNOWN:
            return self.generic_visit(node)
        return self.visit(node.body if test else node.orelse)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        parts, decisive = [*map(self.visit, node.values)], isinstance(node.op, ast.Or)
        node.values = [part for part in parts if _known(part) is _UNKNOWN]
        if any(bool(_known(part)) is decisive for part in parts if part not in node.values):
            return ast.Constant(decisive)
        if not node.values:
            return ast.Constant(not decisive)
        return node if len(node.values) > 1 else node.values[0]

    def visit_Compare(self, node: ast.Compare) -> Any:
        self.generic_visit(node)
        match node:
            case ast.Compare(ops=[ast.Is() | ast.IsNot() as way], comparators=[ast.Constant(None)]):
                # What is not known to be None is a tensor.
                return ast.Constant((_known(node.left) is None) == isinstance(way, ast.Is))
        return self.computed(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        self.generic_visit(node)
        return self.computed(node)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        zeros = [_known(node.left) == 0, _known(node.right) == 0]
        if isinstance(node.op, ast.Mult) and any(zeros):
            return ast.Constant(0)
        if isinstance(node.op, ast.Add) and any(zeros):
            return node.left if zeros[1] else node.right
        return self.computed(node)

    def computed(self, node: ast.expr) -> ast.expr:
        """An operation, with its value where all that it takes is known."""
        parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        if not all(_is_plain(_known(part)) for part in parts):
            return node
        return _knowing(node, eval(ast.unparse(node), {"__builtins__": {}}, self.names))

    def visit_Call(self, node: ast.Call) -> Any:
        node.args = [self.visit(argument) for argument in node.args]
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        callee = self.globals.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if isinstance(callee, JITFunction):
            return self.device_call(node, callee)
        node.func = self.visit(node.func)
        function, values = ast.unparse(node.func), [*map(_known, node.args)]
        if function == "tl.cdiv" and all(map(_is_plain, values)):
            return ast.Constant(-(-values[0] // values[1]))
        if function == "tl.program_id" and self.single is not None and values == [self.single]:
            return ast.Constant(0)
        return self.table_load(node) if function == "tl.load" else node

    def device_call(self, node: ast.Call, callee: JITFunction) -> ast.Call:
        """A call of a device function, without the arguments that are known."""
        given = dict(zip(callee.arg_names, node.args))
        given |= {str(keyword.arg): keyword.value for keyword in node.keywords}
        constants = {parameter.name for parameter in callee.params if parameter.is_constexpr}
        values = {name: _known(argument) for name, argument in given.items()}
        known = {
            name: value
            for name, value in values.items()
            if isinstance(value, Table) or value is None or (name in constants and _is_plain(value))
        }
        made = self.program.add(callee, known)
        left = [ast.keyword(name, given[name]) for name in made.parameters]
        plain = [] if node.keywords else [each.value for each in left]
        return ast.Call(ast.Name(made.name, ast.Load()), plain, left if node.keywords else [])

    def table_load(self, node: ast.Call) -> ast.expr:
        """What a load from a known table is instead."""
        terms = _terms(node.args[0])
        for pointer in terms:
            table = _known(pointer)
            if isinstance(table, Table):
                others = [term for term in terms if term is not pointer]
                index: ast.expr = ast.Constant(0) if not others else others[0]
                for term in others[1:]:
                    index = ast.BinOp(index, ast.Add(), term)
                if table.constant is not None:
                    return ast.Constant(table.constant)
                if table.is_identity:
                    return index
                return ast.Call(ast.Name(self.program.add_table(table), ast.Load()), [index], [])
        return node


# -- values that nothing reads --------------------------------------------------------------------


def _pruned(body: list[ast.stmt]) -> list[ast.stmt]:
    """Without values that nothing reads, and without loops and branches of nothing."""
    while True:
        before = sum(1 for statement in body for _ in ast.walk(statement))
        pruner = _Pruner(_read(body))
        body = [s for statement in body if (s := pruner.visit(statement)) is not None]
        if sum(1 for statement in body for _ in ast.walk(statement)) == before:
            return body


class _Pruner(ast.NodeTransformer):
    def __init__(self, read: set[str]) -> None:
        self.read = read

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign) -> Any:
        name = _target(node)
        # Of what kernels assign, only atomic operations do something besides.
        return node if not name or name in self.read or ".atomic_" in ast.unparse(node) else None

    visit_AnnAssign = visit_Assign

    def visit_For(self, node: ast.For | ast.If) -> Any:
        self.generic_visit(node)
        return node if node.body else None

    visit_If = visit_For


def _read(body: Sequence[ast.stmt]) -> set[str]:
    """Names that are read; one that is only added to counts as read."""
    nodes = [node for statement in body for node in ast.walk(statement)]
    loads = (n for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    return {n.id for n in loads} | {_target(n) for n in nodes if isinstance(n, ast.AugAssign)}


# -- nodes ----------------------------------------------------------------------------------------


def _bound(tree: ast.AST) -> list[str]:
    """Names that are bound, each as often as it is."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def _constant(name: str, value: Any) -> ast.AnnAssign:
    """``name: tl.constexpr = value``."""
    kind = ast.Attribute(ast.Name("tl", ast.Load()), "constexpr", ast.Load())
    return ast.AnnAssign(ast.Name(name, ast.Store()), kind, ast.Constant(value), simple=1)


def _known(node: ast.AST) -> Any:
    """The value of a visited expression, or `_UNKNOWN`."""
    return node.value if isinstance(node, ast.Constant) else getattr(node, "known", _UNKNOWN)


def _knowing(node: ast.expr, value: Any) -> ast.expr:
    node.known = value  # type: ignore[attr-defined]
    return node


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _target(node: ast.stmt) -> str:
    """The one name that a statement binds, or ""."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    (target, *more) = targets
    return target.id if isinstance(target, ast.Name) and not more else ""


def _terms(node: ast.expr) -> list[ast.expr]:
    """What a sum adds up."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]
