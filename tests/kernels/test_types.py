"""mypy asks no types of files with jitted functions; these tests ask their other functions."""

import ast
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "kernels/triton").glob("*.py"))


def functions(path):
    """(function, whether Triton compiles it) of all functions of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            yield node, any(text.startswith("triton.jit") for text in decorators)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_functions_are_typed_unless_triton_compiles_them(path):
    for function, jitted in functions(path):
        every = function.args
        arguments = [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]
        named = [a for a in arguments if a is not None and a.arg not in ("self", "cls")]
        typed = function.returns is not None and all(a.annotation for a in named)
        assert jitted or typed, function.name


def test_there_are_jitted_functions():
    assert sum(jitted for path in FILES for _, jitted in functions(path)) > 5
