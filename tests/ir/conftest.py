import pytest
from architectures import ARCHITECTURES, TEXT_ONLY, small_llava

from planner.ir.lowering import lower_config


@pytest.fixture(scope="session")
def lowered():
    """Name of an architecture -> (what must be found, `Lowered`); each is lowered once."""
    known = ARCHITECTURES | TEXT_ONLY
    cache = {}

    def get(name):
        if name not in cache:
            expected = known[name]()
            cache[name] = (expected, lower_config(expected.config, name))
        return cache[name]

    return get


@pytest.fixture(scope="session")
def small():
    """Graph of a small LLaVA with the given sizes; each is lowered once."""
    cache = {}

    def get(**sizes):
        key = tuple(sorted(sizes.items()))
        if key not in cache:
            cache[key] = lower_config(small_llava(**sizes), "small").graph
        return cache[key]

    return get
