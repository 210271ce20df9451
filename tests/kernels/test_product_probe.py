"""Who multiplies is measured once, kept, and measured again where what was kept is broken."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from planner.kernels.ops import kept_linear, product_probe
from planner.kernels.ops.kept_linear import ONEDNN
from planner.kernels.ops.product_probe import fastest, onednn_is_faster

pytestmark = pytest.mark.skipif(not ONEDNN, reason="there is nothing to choose from")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measurements say in turn what this list says; it grows by what is asked."""
    answers = []

    def measure():
        answers.append((len(answers) % 2 == 0, False, True, False))
        return answers[-1]

    monkeypatch.setenv("PLANNER_CACHE", str(tmp_path))
    monkeypatch.setattr(product_probe, "_onednn_is_faster", measure)
    fastest.cache_clear()
    yield answers
    fastest.cache_clear()


def test_what_was_measured_is_kept_for_the_next_process(measured):
    first = fastest(1)
    fastest.cache_clear()
    assert fastest(1) == first == measured[0]
    assert len(measured) == 1
    assert fastest(2) == measured[1]  # other threads are another machine


@pytest.mark.parametrize("text", ["", "[true]", "[1, 0, 1, 0]", "{}", "[[], [], [], []]", "NaN"])
def test_what_is_broken_is_measured_again(measured, tmp_path, text):
    fastest(1)
    (path,) = tmp_path.glob("products/*.json")
    path.write_text(text)
    fastest.cache_clear()
    assert fastest(1) == measured[1]
    fastest.cache_clear()
    assert fastest(1) == measured[1]


def test_rows_are_of_four_kinds(monkeypatch):
    monkeypatch.setattr(product_probe, "fastest", lambda threads: (True, False, True, False))
    found = {rows: onednn_is_faster(rows) for rows in (1, 3, 4, 23, 24, 127, 128, 5000)}
    assert found == {
        1: True, 3: True, 4: False, 23: False, 24: True, 127: True, 128: False, 5000: False
    }  # fmt: skip


def test_the_measurement_itself_is_seen_by_no_mode_and_quick_to_say(monkeypatch, tmp_path):
    monkeypatch.setenv("PLANNER_CACHE", str(tmp_path))
    monkeypatch.setattr(kept_linear, "SMALL", 1)
    fastest.cache_clear()
    features, weight = torch.randn(3, 8), torch.randn(5, 8)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        product = kept_linear.kept_linear(features, weight, None)
    fastest.cache_clear()
    torch.testing.assert_close(product, F.linear(features, weight))
    assert counter.get_total_flops() == 2 * 3 * 8 * 5
    assert len(list(tmp_path.glob("products/*.json"))) == 1
