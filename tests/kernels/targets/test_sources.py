"""Generated sources: what they compute, interpreted, against the twins in float64; golden text."""

import ast
import re

import pytest
import torch
from blocks import assert_close
from kernel_cases import CASES, NAMED, case_of, cast_inputs, changed

from planner.kernels.targets.plan_launches import Call
from planner.kernels.targets.sources import load_function, sources_of
from planner.kernels.triton.launch import loaded, recorded, run
from planner.kernels.triton.tiles import TARGETS

TARGET = TARGETS["sm_80"]


def source_of(launch, any_plan=False):
    call = Call("mlp.down_proj", 3, "prefill", 1, 7, lambda: None)
    (source,) = sources_of([(call, launch)], any_plan=any_plan)
    return source


def text_of(source):
    return source.text("sm_80", "Model small, plan 0123456789abcdef")


class Generating:
    """Runs every launch by a kernel generated for it."""

    def __init__(self, folder, any_plan):
        self.folder, self.any_plan, self.sources = folder, any_plan, []

    def __call__(self, launch):
        source = source_of(launch, self.any_plan)
        path = self.folder / f"{source.name}_{len(self.sources)}.py"
        path.write_text(text_of(source))
        run(load_function(path, source.function), launch)
        self.sources.append(source)
        return True


FORMS = [
    (name, index, any_plan)
    for name, index in CASES
    for any_plan in ((False, True) if index % 3 == 0 else (False,))
]


@pytest.mark.parametrize(("name", "index", "any_plan"), FORMS)
def test_a_generated_kernel_computes_what_its_twin_does(name, index, any_plan, tmp_path):
    kernel, case = NAMED[name], case_of(name, index)
    dtype = kernel.dtypes[index % len(kernel.dtypes)]
    given = cast_inputs(case.inputs, dtype)
    want = cast_inputs(given, torch.float64).twin()
    generating = Generating(tmp_path, any_plan)
    token = loaded.set(generating)
    try:
        got = kernel(given, **case.options)
    finally:
        loaded.reset(token)
    for source in generating.sources:
        check_text(source, any_plan)
    assert generating.sources[0].launch.kernel is kernel
    if got.is_floating_point():
        assert torch.equal(got.isnan(), want.isnan()), case.name
        assert_close(got.nan_to_num(0.0), want.nan_to_num(0.0), dtype)
    else:
        assert torch.equal(got, want), case.name


def check_text(source, any_plan):
    """It stands alone, fits a page, and has decided all that is known."""
    tree = ast.parse(text_of(source))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {alias.name for node in imports for alias in node.names} == {"triton", "triton.language"}
    assert max(map(len, text_of(source).splitlines())) <= 100
    assert not re.search(r"is (not )?None", text_of(source))
    survivors = source.launch.survivors
    if survivors is not None and survivors.plans == 1 and not any_plan:
        assert {"units", "counts", "lanes", "slots", "plan_stride"}.isdisjoint(source.arguments)


# -- text -----------------------------------------------------------------------------------------

# Kernel, case, whether for any plan.
GOLDEN = {
    "project_rows_scattered": ("project_rows", 4, False),
    "project_rows_gated": ("project_rows", 6, False),
    "project_columns_of_any_plan": ("project_columns", 1, True),
    "attend_one_token": ("attend", 3, False),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_source(name, golden):
    kernel, index, any_plan = GOLDEN[name]
    case = case_of(kernel, index)
    with recorded(TARGET) as launches:
        NAMED[kernel](changed(case.inputs, lambda x: x.to("meta")), **case.options)
    golden(f"{name}.py.txt", without_docstrings(text_of(source_of(launches[0], any_plan))))


def without_docstrings(text):
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
            document = node.body[0]
            lines[document.lineno - 1 : document.end_lineno] = [None] * (
                document.end_lineno - document.lineno + 1
            )
    return "\n".join(line for line in lines if line is not None).strip() + "\n"
