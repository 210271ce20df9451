"""Who multiplies is measured once, kept, and measured again where what was kept is broken."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from planner.kernels.ops import kept_linear, product_probe
from planner.kernels.ops.kept_linear import ONEDNN
from planner.kernels.ops.product_probe import OTHER_WAYS, by_fastest, other_is_faster, turned

pytestmark = pytest.mark.skipif(not ONEDNN, reason="there is nothing to choose from")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measurements say in turn what this list says; it grows by what is asked."""
    answers = []

    def measure(dtype):
        answers.append((len(answers) % 2 == 0, False, True, False))
        return answers[-1]

    monkeypatch.setenv("PLANNER_CACHE", str(tmp_path))
    monkeypatch.setattr(product_probe, "_measured", measure)
    other_is_faster.cache_clear()
    yield answers
    other_is_faster.cache_clear()


def test_what_was_measured_is_kept_for_the_next_process(measured):
    first = other_is_faster(1, torch.float32)
    other_is_faster.cache_clear()
    assert other_is_faster(1, torch.float32) == first == measured[0]
    assert len(measured) == 1
    assert other_is_faster(2, torch.float32) == measured[1]  # other threads are another machine
    assert other_is_faster(1, torch.bfloat16) == measured[2]


@pytest.mark.parametrize("text", ["", "[true]", "[1, 0, 1, 0]", "{}", "[[], [], [], []]", "NaN"])
def test_what_is_broken_is_measured_again(measured, tmp_path, text):
    other_is_faster(1, torch.float32)
    (path,) = tmp_path.glob("products/*.json")
    path.write_text(text)
    other_is_faster.cache_clear()
    assert other_is_faster(1, torch.float32) == measured[1]
    other_is_faster.cache_clear()
    assert other_is_faster(1, torch.float32) == measured[1]


def test_rows_are_of_four_kinds(monkeypatch):
    asked = []
    kinds = (True, False, True, False)
    monkeypatch.setattr(product_probe, "other_is_faster", lambda threads, dtype: kinds)
    monkeypatch.setitem(OTHER_WAYS, torch.float32, lambda x, *_: asked.append(len(x)))
    for rows in (1, 2, 23, 24, 127, 128, 5000):
        by_fastest(torch.randn(rows, 4), torch.randn(3, 4), None)
    assert asked == [1, 24, 127]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 1), (3, 5), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "turned"])
def test_a_turned_product_is_linear_s(shape, bias, layout):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(40, 40, generator=generator).bfloat16()
    weight = {"rows": numbers[3:33], "columns": numbers[:30, 4:], "turned": numbers[:, :30].t()}
    weight = weight[layout]
    x = torch.randn(*shape, weight.shape[1], generator=generator).bfloat16()
    offset = torch.randn(30, generator=generator).bfloat16() if bias else None
    found = turned(x, weight, offset)
    exact = [None if t is None else t.double() for t in (x, weight, offset)]
    # Rounded as often as `F.linear`'s, a sum with a bias once more.
    torch.testing.assert_close(found.double(), F.linear(*exact), rtol=0.01, atol=0.02)
    assert found.is_contiguous()


def test_what_is_slow_is_compared_in_few_rounds_and_what_is_quick_in_many(monkeypatch):
    clock, calls = itertools.count(), []
    monkeypatch.setattr(product_probe.time, "perf_counter", lambda: next(clock) * seconds)
    for seconds, rounds in ((1, 3), (0.001, 7)):  # noqa: B007 - the clock reads it
        calls.clear()
        product_probe.ratio(lambda: calls.append(0), lambda: calls.append(1))
        assert calls == [0, 1] * rounds


def test_the_measurement_itself_is_seen_by_no_mode_and_quick_to_say(monkeypatch, tmp_path):
    monkeypatch.setenv("PLANNER_CACHE", str(tmp_path))
    monkeypatch.setattr(kept_linear, "SMALL", 1)
    other_is_faster.cache_clear()
    features, weight = torch.randn(3, 8), torch.randn(5, 8)
    state = torch.random.get_rng_state()
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), torch.device("meta"):
        product = kept_linear.kept_linear(features, weight, None)
    assert torch.equal(torch.random.get_rng_state(), state)
    other_is_faster.cache_clear()
    torch.testing.assert_close(product, F.linear(features, weight))
    assert counter.get_total_flops() == 2 * 3 * 8 * 5
    assert len(list(tmp_path.glob("products/*.json"))) == 1
