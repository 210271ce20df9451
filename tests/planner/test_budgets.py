from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.ir.errors import InputError
from planner.planning.budgets import Budget, Limit


@pytest.mark.parametrize(
    ("text", "metric", "value", "of_base"),
    [
        ("0.65", "flops", Fraction(65, 100), True),
        ("65%", "flops", Fraction(65, 100), True),
        ("1", "flops", Fraction(1), True),
        ("kv=256MiB", "kv", Fraction(256 * 2**20), False),
        ("kv=0.5", "kv", Fraction(1, 2), True),
        ("latency=49ms", "latency", Fraction(49, 1000), False),
        ("memory=12GiB", "memory", Fraction(12 * 2**30), False),
        ("flops=5.5TFLOP", "flops", Fraction(55 * 10**11), False),
        ("flops=2e12", "flops", Fraction(2 * 10**12), False),
    ],
)
def test_limits_are_read_exactly(text, metric, value, of_base):
    assert Limit.parse(text) == Limit(metric, value, of_base)


@pytest.mark.parametrize(
    "text",
    ["0", "1.5", "nan", "inf", "-0.5", "49 parsecs", "", "kv=", "kv=0B", "kv=-1MiB", "kv=3",
     "speed=1", "latency=5kg", "0.65x", "latency=1.5", "0%", "120%"],
)  # fmt: skip
def test_bad_budgets_are_one_sentence(text):
    with pytest.raises(InputError) as error:
        Budget.of(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) > 20


@pytest.mark.parametrize("value", [0, 1.5, float("nan"), True, None, [], object(), -1])
def test_bad_values_from_python(value):
    with pytest.raises(InputError):
        Budget.of(value)


def test_a_metric_is_limited_once():
    with pytest.raises(InputError, match="twice"):
        Budget.of(["0.5", "flops=0.6"])


def test_mappings_and_numbers():
    assert Budget.of({"flops": 0.65}) == Budget.of(0.65) == Budget.of(["0.65"])
    assert Budget.of({"kv": "256MiB"}).limits[0].value == 256 * 2**20


@given(st.floats(min_value=1e-6, max_value=1, exclude_min=True))
def test_every_fraction_is_exact(value):
    limit = Budget.of(value).limits[0]
    assert limit.value == Fraction(str(value))
