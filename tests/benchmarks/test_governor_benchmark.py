import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "governor.py"


@pytest.fixture(scope="module")
def rows():
    """(trace, policy) -> what it came to."""
    spec = importlib.util.spec_from_file_location("benchmark_of_governor", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield {(row["trace"], row["policy"]): row for row in module.measure(800, 1)}
    del sys.modules[spec.name]


def test_the_oracle_is_never_beaten(rows):
    for (trace, _), row in rows.items():
        assert row["score"] <= rows[trace, "oracle"]["score"] + 1e-9


def test_the_governor_keeps_deadlines_near_the_oracle_s_accuracy(rows):
    traces = {trace for trace, _ in rows}
    assert len(traces) == 5
    for trace in traces:
        governed, best = rows[trace, "governor"], rows[trace, "oracle"]
        assert governed["kept"] >= best["kept"] - 0.02
        # The oracle knows the noise, too: where a plan takes about as long as there is, it takes it
        # whenever that turns out well, and a promise that 99 of 100 keep does not.
        assert governed["accuracy"] >= best["accuracy"] - 0.035
        if best["kept"] == 1:
            assert governed["steady"] >= 0.99
        for other in ("none (base model)", "AIMD", "PID"):
            assert governed["kept"] >= rows[trace, other]["kept"] - 0.005


def test_the_second_request_after_a_step_is_in_time(rows):
    assert rows["half of the cores taken", "governor"]["second"] == 1
    assert rows["half of the cores taken", "none (base model)"]["second"] < 1
