"""Specialised functions, line by line."""

import textwrap

import pytest
import triton
import triton.language as tl

from planner.kernels.specialise import Program
from planner.kernels.tables import Table


@triton.jit
def scaled(x, factor, POWER: tl.constexpr):
    """x, scaled."""
    if POWER == 2:
        return x * factor * factor
    return x * factor


@triton.jit(do_not_specialize=["rows"])
def example_kernel(
    x,  # [rows, width]
    bias,  # [width] or None: nothing is added
    units,  # [samples, slots]
    counts,  # [samples]
    out,  # [rows, width]
    rows,
    width,
    EVEN: tl.constexpr,
):
    """An example."""
    sample = tl.program_id(1)
    end = tl.load(counts + sample) * 4
    # This goes with the branch.
    if tl.program_id(0) >= end:
        return
    units += sample * rows
    unit = tl.load(units + tl.program_id(0), mask=sample < 3, other=0)  # [1]
    base = unit + 1
    # What is added stays where it was.
    value = tl.load(x + (sample * rows + unit) * width)
    if EVEN:
        value = scaled(value, width, 2)
    else:
        value = scaled(value, width, 1)
    if bias is not None:
        value += tl.load(bias + base)
    for step in range(0, end, width):
        if EVEN == 1 and step > 0:
            value += 0
        if EVEN == 0 and width == 8:
            value += 1
        tl.store(out + step, value, mask=step < (0 if EVEN else rows))


def written(known, **options):
    program = Program()
    program.add(example_kernel, known, **options)
    return program


def test_constants_are_named_and_dead_branches_gone():
    table = Table.of("kept", "Units 0 and 2-3.", [0, 2, 3])
    known = {"bias": None, "width": 8, "EVEN": True, "units": table, "counts": Table.filled(3)}
    program = written(known, programs={1: 0})
    assert program.source == textwrap.dedent(
        '''\
        @triton.jit
        def kept(slot):
            """Units 0 and 2-3."""
            entry = slot
            entry = tl.where(slot >= 1, slot + 1, entry)
            return entry


        @triton.jit
        def scaled(x, factor):
            """x, scaled."""
            return x * factor * factor


        @triton.jit
        def example_kernel(
            x,  # [rows, width]
            out,  # [rows, width]
        ):
            """An example."""
            width: tl.constexpr = 8
            end: tl.constexpr = 12
            unit = kept(tl.program_id(0))  # [1]
            # What is added stays where it was.
            value = tl.load(x + unit * width)
            value = scaled(value, width)
            for step in range(0, end, width):
                tl.store(out + step, value, mask=step < 0)
        '''
    )


def test_what_is_not_known_stays():
    program = written({"EVEN": False})
    kernel = program.functions["example_kernel"]
    assert kernel.parameters == ("x", "bias", "units", "counts", "out", "rows", "width")
    assert "# This goes with the branch." in kernel.source
    assert "if bias is not None:" not in kernel.source, "what is not known to be None is there"
    assert "value += tl.load(bias + base)" in kernel.source
    assert "if EVEN == 0 and width == 8:" in kernel.source
    assert "if EVEN == 1 and step > 0:" not in kernel.source
    assert "tl.load(units + tl.program_id(0), mask=sample < 3, other=0)" in kernel.source


def test_equal_functions_are_written_once():
    program = written({"EVEN": True})
    program.add(example_kernel, {"EVEN": True})
    assert [*program.functions] == ["scaled", "example_kernel"]
    program.add(example_kernel, {"EVEN": False})
    assert [*program.functions] == ["scaled", "example_kernel", "scaled_v2", "example_kernel_v2"]


@triton.jit
def with_while(x, n):
    """Not of the kind that kernels are made of here."""
    while n > 0:
        n -= 1
    tl.store(x, n)


@triton.jit
def with_elif(x, n):
    """Nor this."""
    if n > 1:
        tl.store(x, n)
    elif n > 0:
        tl.store(x, 0)


@pytest.mark.parametrize(("function", "what"), [(with_while, "while"), (with_elif, "elif")])
def test_what_cannot_be_specialised_is_said(function, what):
    with pytest.raises(NotImplementedError, match=f"'{what}' cannot be specialised"):
        Program().add(function, {})
