"""Gradients against those of enumeration, to the figures of docs/estimators.md."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from planner.training.estimators import GumbelSequential
from planner.training.gradient_check import CASES, check, exact_gradient, main, methods_of

LINEAR, PAIRWISE, UNEQUAL, UNITS = CASES
DRAWS = 20_000
PAGE = (Path(__file__).parents[2] / "docs/estimators.md").read_text(encoding="utf-8")


def test_simple_is_exact_where_f_is_linear():
    found = check(LINEAR, "simple", DRAWS)
    assert found.bias < 1e-4
    assert found.deviation < 1e-4


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
@pytest.mark.parametrize("method", ["score of gumbel", "score of simple"])
def test_score_functions_are_unbiased(case, method):
    found = check(case, method, DRAWS)
    # The norm of six errors: its mean is one standard error.
    assert found.bias < 2.5 * found.bias_error
    assert found.cosine > 0.99


@pytest.mark.parametrize(
    ("case", "method"), [(case, name) for case in CASES for name in methods_of(case)[:6]], ids=str
)
def test_biases_are_those_of_the_page(case, method):
    row = re.search(
        rf"^\| {case.name} \| {re.escape(method)} \| (\S+) \| \S+ \| (\S+) \| (\S+) \|", PAGE, re.M
    )
    found = check(case, method, DRAWS, seed=1)
    assert found.bias == pytest.approx(float(row[1]), abs=0.01 + 4 * found.bias_error)
    assert found.cosine == pytest.approx(float(row[2]), abs=0.02)
    assert found.deviation == pytest.approx(float(row[3]), abs=0.06)


def test_the_exact_gradient_is_that_of_finite_differences():
    """The mean of f worked out draw by draw."""

    def expected(logits):
        weights = logits.double().exp()

        def value(taken, left):
            open_switches = [
                i for i in range(6) if i not in taken and int(UNEQUAL.costs[i]) <= left
            ]
            if not open_switches:
                gates = torch.tensor([[float(i in taken) for i in range(6)]])
                return UNEQUAL.f(gates).item()
            total = weights[open_switches].sum()
            return sum(
                (weights[i] / total).item() * value((*taken, i), left - int(UNEQUAL.costs[i]))
                for i in open_switches
            )

        return value((), UNEQUAL.limit)

    exact = exact_gradient(UNEQUAL, "gumbel")
    for switch in range(6):
        step = torch.zeros(6)
        step[switch] = 1e-3
        slope = (expected(UNEQUAL.logits + step) - expected(UNEQUAL.logits - step)) / 2e-3
        assert exact[switch].item() == pytest.approx(slope, abs=1e-3)
    other = replace(UNEQUAL, linear=torch.zeros(6), pairs=torch.zeros(6, 6))
    assert exact_gradient(other, "simple").abs().max() < 1e-6


def test_the_exact_gradient_of_units_is_that_of_what_is_drawn():
    """The score function of draws counts how often each set of switches was drawn."""
    heads, unit = UNITS.units
    draws = 100_000

    def mean(logits):
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            rows, limits = logits.repeat(draws, 1), torch.full((draws,), UNITS.limit)
            gates = GumbelSequential(1.0).draw_units(rows, limits, heads, unit, generator)
        return UNITS.f(gates).double().mean().item()

    exact, step = exact_gradient(UNITS, "gumbel"), 0.3
    for switch in (0, 5, 14):
        moved = torch.zeros(16)
        moved[switch] = step
        slope = (mean(UNITS.logits + moved) - mean(UNITS.logits - moved)) / (2 * step)
        # Common random numbers leave little noise; the step's own error is of second order.
        assert exact[switch].item() == pytest.approx(slope, abs=0.06)


def test_the_command(capsys):
    main(["--draws", "50", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == sum(len(methods_of(case)) for case in CASES)
    with pytest.raises(SystemExit) as stopped:
        main(["--draws", "1"])
    assert stopped.value.code == 2
