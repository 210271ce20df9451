"""A short budget of fuzzing in the suite, the same inputs every time; ``make fuzz`` goes on."""

import pytest
from fuzzing import fuzz, judge
from targets import TARGETS

from planner.ir.errors import InputError

CASES = {
    "plans": 120,
    "graphs": 150,
    "options": 40,
    "pictures": 300,
    "utilities": 120,
    "configs": 100,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_every_input_is_taken_or_refused_with_a_sentence(name):
    taken = fuzz(name, CASES[name])
    # Mutations are small: some inputs stay valid, and most are not.
    assert taken < CASES[name]


def _raises(error):
    def take(value):
        raise error

    return take


def test_what_is_neither_taken_nor_refused_is_found():
    assert judge(lambda value: None, 1)
    assert not judge(_raises(InputError("no")), 1)
    for error in (ValueError("x"), MemoryError()):
        with pytest.raises(type(error)):
            judge(_raises(error), 1)
