"""Functions with some parameters known, line by line."""

import inspect
import textwrap

import pytest
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.kernels.targets.partial_evaluation import Program
from planner.kernels.targets.tables import Table

HALF = tl.constexpr(0.5)


@triton.jit
def scaled(x, factor, POWER: tl.constexpr):
    """x, scaled."""
    if POWER == 2:
        return x * factor * factor
    return x * factor


@triton.jit
def looked_up(units, place):
    return tl.load(units + place)


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
    if EVEN == 0 and tl.program_id(0) >= end:
        return
    units += sample * rows

    # First comes this.
    unit = tl.load(units + tl.program_id(0), mask=sample < 3, other=0)  # [1]
    base = unit + 1
    # What is added stays where it was.
    value = tl.load(x + (sample * rows + unit) * width)
    if EVEN:
        # Inside.
        value = scaled(value, width, 2) * HALF
    else:
        value = scaled(value, POWER=1, factor=looked_up(units + 0, width))
    if bias is not None:
        value += tl.load(bias + base)
    elif rows > 4:
        value -= 1.0
    for step in range(0, end, width):
        if EVEN == 1 and step > 0:
            value += 0
        if not EVEN and width == 8:
            value += 1
        tl.store(out + step, value, mask=step < (0 if EVEN else rows))


def written(known, **options):
    program = Program()
    program.add(example_kernel, known, **options)
    return program


def test_constants_are_named_and_dead_branches_gone():
    known = {
        "bias": None,
        "width": 8,
        "EVEN": True,
        "units": Table.of("unit_at", "Units 0 and 2-3.", [0, 2, 3]),
        "counts": Table.of("count_at", "", [3]),
    }
    program = written(known, single=1)
    assert program.source == textwrap.dedent(
        '''\
        @triton.jit
        def unit_at(index):
            """Units 0 and 2-3."""
            entry = index
            entry = tl.where(index >= 1, index + 1, entry)
            return entry


        @triton.jit
        def scaled(x, factor):
            """x, scaled."""
            return x * factor * factor


        @triton.jit(do_not_specialize=["rows"])
        def example_kernel(
            x,  # [rows, width]
            out,  # [rows, width]
            rows,
        ):
            """An example."""
            width: tl.constexpr = 8
            end: tl.constexpr = 12

            # First comes this.
            unit = unit_at(tl.program_id(0))  # [1]
            # What is added stays where it was.
            value = tl.load(x + unit * width)
            # Inside.
            value = scaled(value, width) * 0.5
            if rows > 4:
                value -= 1.0
            for step in range(0, end, width):
                tl.store(out + step, value, mask=step < 0)
        '''
    )


def test_what_is_not_known_stays():
    program = written({"EVEN": False})
    kernel = program.functions["example_kernel"]
    assert kernel.parameters == ("x", "bias", "units", "counts", "out", "rows", "width")
    assert "    # This goes with the branch.\n    if tl.program_id(0) >= end:" in kernel.source
    assert "if bias is not None:" not in kernel.source, "what is not known to be None is there"
    assert "value += tl.load(bias + base)" in kernel.source
    assert "value -= 1.0" not in kernel.source
    assert "if width == 8:" in kernel.source
    assert "step > 0" not in kernel.source
    assert "tl.load(units + tl.program_id(0), mask=sample < 3, other=0)" in kernel.source
    assert "scaled(x=value, factor=looked_up(units, width))" in kernel.source
    assert "def looked_up(units, place):\n    return tl.load(units + place)" in program.source


def test_a_table_is_handed_on():
    table = Table.of("unit_at", "", [0, 2, 3])
    program = written({"EVEN": False, "units": table}, single=1)
    assert "def looked_up(place):\n    return unit_at(place)" in program.source
    assert "factor=looked_up(width)" in program.source


def test_equal_functions_are_written_once():
    program = written({"EVEN": True})
    program.add(example_kernel, {"EVEN": True})
    assert [*program.functions] == ["scaled", "example_kernel"]
    program.add(example_kernel, {"EVEN": False})
    assert [*program.functions] == [
        *("scaled", "example_kernel"),
        *("looked_up", "scaled_v2", "example_kernel_v2"),
    ]


@triton.jit
def with_while(x, n):
    """Not of the kind that kernels are made of here."""
    while n > 0:
        n -= 1
    tl.store(x, n)


@triton.jit
def with_arithmetic_on_a_table(x, n):
    """Nor this: a table has no address."""
    tl.store(x, n + tl.program_id(0))


@triton.jit
def with_a_number_that_changes(x, n):
    """Nor this."""
    n += 1
    tl.store(x, n)


@pytest.mark.parametrize(
    ("function", "known", "what"),
    [
        (with_while, {}, "'while' cannot be specialised"),
        (with_arithmetic_on_a_table, {"n": Table.of("at", "", [1, 5])}, "only loads can read 'n'"),
        (with_a_number_that_changes, {"n": 4}, "'n' is known and changes"),
    ],
)
def test_what_cannot_be_specialised_is_said(function, known, what):
    with pytest.raises(NotImplementedError, match=what):
        Program().add(function, known)


@triton.jit
def spread_kernel(some_values, other_values, yet_other_values, WHICH: tl.constexpr):
    """Written on several lines."""
    total = tl.where(
        some_values > other_values,
        (yet_other_values),
        other_values,
    )  # [1]
    if WHICH:
        tl.store(some_values, (
            total
        ))  # fmt: skip


def test_what_does_not_change_stays_as_it_was_written():
    source = Program().add(spread_kernel, {"WHICH": True}).source
    original = textwrap.dedent(inspect.getsource(spread_kernel.fn)).splitlines()
    assert source.splitlines()[2:8] == original[2:8]
    branch = [line[4:] for line in original[-3:]]
    assert source.splitlines()[8:] == branch


class _Arrays:
    """`tl`, as far as a table's function uses it, on integers."""

    @staticmethod
    def where(test, yes, no):
        return yes if test else no


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_tables_compute_their_entries(entries):
    table = Table.of("entry", "", entries)
    code = table.source.partition("\n")[2]
    scope = {"tl": _Arrays}
    exec(code, scope)
    assert [scope["entry"](slot) for slot in range(len(entries))] == entries
    assert table.constant is None or {*entries} == {table.constant}
    assert not table.is_identity or entries == [*range(len(entries))]
