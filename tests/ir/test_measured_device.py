"""A measured device: between sizes what a roofline says, and never less for more work."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.ir.cost import Workload, price
from planner.ir.cost.measured_device import ALONE, MeasuredDevice, Measurement, Passes, Table
from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Operator

AXES = ((1.0, 8.0, 100.0), (64.0, 1000.0), (64.0, 256.0, 4096.0))


def table(function, axes=AXES):
    return Table(axes, tuple(function(*sizes) for sizes in itertools.product(*axes)))


@given(st.tuples(st.floats(1, 100), st.floats(64, 1000), st.floats(64, 4096)))
def test_both_sides_of_a_roofline_are_met_exactly(sizes):
    rows, columns, out = sizes
    compute = table(lambda m, k, n: m * k * n)
    memory = table(lambda m, k, n: 1 + m * k + k * n + m * n)
    assert math.isclose(compute.at(*sizes), rows * columns * out)
    assert math.isclose(memory.at(*sizes), 1 + rows * columns + columns * out + rows * out)


@given(
    st.lists(st.floats(0, 5), min_size=18, max_size=18),
    st.lists(st.floats(1, 1e5), min_size=3, max_size=3),
    st.integers(0, 2),
    st.floats(1, 10),
)
def test_more_never_takes_less(steps, sizes, axis, times):
    growing = iter(itertools.accumulate(steps, initial=1.0))
    found = Table(AXES, tuple(itertools.islice(growing, 18)))
    # Sums over the lower corner grow along every axis.
    grown = table(
        lambda *most: sum(
            found.at(*some)
            for some in itertools.product(*AXES)
            if all(a <= b for a, b in zip(some, most))
        )
    )
    more = [size * (times if place == axis else 1) for place, size in enumerate(sizes)]
    assert grown.at(*more) >= grown.at(*sizes) * (1 - 1e-9)


def test_beyond_the_largest_size_seconds_grow_with_it_and_below_the_smallest_they_stay():
    line = table(lambda n: 3 * n, ((10.0, 20.0),))
    assert line.at(200) == pytest.approx(600)
    assert line.at(1) == 30
    assert table(lambda n: 5.0, ((7.0,),)).at(14) == 10


@pytest.mark.parametrize(
    ("axes", "seconds"),
    [(((2.0, 1.0),), (1.0, 1.0)), (((1.0, 2.0),), (1.0,)), (((1.0,),), (0.0,)), (((),), ())],
)
def test_what_is_no_table_is_refused(axes, seconds):
    with pytest.raises(ValueError, match="table"):
        Table(axes, seconds)


def linear():
    shape = (Dim.of("batch"), Dim(5), Dim(256))
    operator = Operator("o", "linear", (), shape).having(**{"bias": 0, "in": 64, "out": 256})
    return operator, Graph("g", (operator,), (), {"dtype_bytes": 4, "decoder_layers": 1})


def line(function, *axis):
    return table(function, (axis,))


def device(extra=None, models=None, **prompt):
    """Products take a second for every multiply-add; terms of a prompt by name."""
    tables = {"product": table(lambda m, k, n: m * k * n), **(extra or {})}
    passes = {"prompt": Passes({**ALONE, **prompt}), "token": Passes()}
    measured = {"float32": Measurement(tables, passes, models or {})}
    return MeasuredDevice("here", 1e-9, 1e-6, 1, "", {}, measured)


def test_an_operator_takes_what_was_measured_and_what_a_model_adds():
    operator, graph = linear()
    sizes = Workload(0, 4, batch=2).prefill()
    assert price(operator, graph, sizes, device()).seconds == pytest.approx(10 * 64 * 256)
    here = device(operator=7.0, products=2.0, **{"pass": 3.0})
    assert price(operator, graph, sizes, here).seconds == pytest.approx(2 * 10 * 64 * 256 + 7)
    assert here.pass_seconds(4, sizes) == 3
    # Decoded tokens have terms of their own.
    token = Workload(0, 4, batch=2).decode(1)
    assert price(operator, graph, token, here).seconds == pytest.approx(10 * 64 * 256)
    assert here.pass_seconds(4, token) == 0


def test_of_a_model_that_was_measured_its_own_terms_count():
    operator, graph = linear()
    known = replace(graph, properties={**graph.properties, "fingerprint": "abc"})
    own = {"abc": {"prompt": Passes({**ALONE, "products": 3.0}, late=0.1), "token": Passes()}}
    here, sizes = device(models=own, products=2.0), Workload(0, 4, batch=2).prefill()
    alone = 10 * 64 * 256
    assert price(operator, graph, sizes, here.on(graph)).seconds == pytest.approx(2 * alone)
    assert price(operator, known, sizes, here.on(known)).seconds == pytest.approx(3 * alone)
    assert (here.on(graph).late(4), here.on(known).late(4)) == (0, 0.1)


@pytest.mark.parametrize(("megabytes", "share"), [(1, 0), (4, 0), (7, 0.5), (10, 1), (1000, 1)])
def test_weights_that_no_cache_holds_take_longer(megabytes, share):
    operator, graph = linear()
    extra = {
        "weights": line(lambda rows: 1e6 * rows, 1.0, 8.0),
        "cached": line(lambda size: size, 4.0, 10.0),
    }
    here = replace(device(extra), weight_bytes=megabytes * 2**20)
    found = price(operator, graph, Workload(0, 4, batch=2).prefill(), here).seconds
    # Ten rows wait as long as the eight of the table.
    assert found == pytest.approx(10 * 64 * 256 + share * 8 * 64 * 256)


def test_how_large_a_model_is_is_read_off_its_graph():
    _, graph = linear()
    assert device().on(graph).weight_bytes == 64 * 256 * 4


def test_all_that_runs_before_the_decoder_is_one_term():
    operator, graph = linear()
    seen = replace(operator, part="vision")
    sizes = Workload(0, 4, batch=2).prefill()
    here = device(products=2.0, encoder=5.0)
    assert price(seen, graph, sizes, here).seconds == pytest.approx(5 * 10 * 64 * 256)


@pytest.mark.parametrize("terms", [{}, {**ALONE, "more": 1.0}, {**ALONE, "light": -0.1}])
def test_what_are_no_terms_is_refused(terms):
    with pytest.raises(ValueError, match="terms"):
        Passes(terms)


def test_what_was_not_measured_takes_what_the_roofline_says():
    norm = Operator("n", "norm", (), (Dim(1000),)).having(bias=0, width=1000)
    graph = Graph("g", (norm,), (), {"dtype_bytes": 4, "decoder_layers": 1})
    assert price(norm, graph, {}, device()).seconds == pytest.approx(8.0)  # bytes


def test_another_precision_must_be_measured_first():
    operator, graph = linear()
    half = Graph("g", (operator,), (), {**graph.properties, "dtype_bytes": 2})
    with pytest.raises(InputError, match="not measured in bfloat16"):
        price(operator, half, Workload(0, 4).prefill(), device())
