"""Measured pairs: what they add up to, files that hold them, plans that count them."""

from dataclasses import replace

import numpy as np
import pytest
from families import FAMILIES

from planner.ir.cost import Workload
from planner.ir.cost.device_table import device
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.calibration import calibrate, sample_of
from planner.models.calibration.leave_one_out import as_gates, measure
from planner.models.calibration.measurement import TOKEN_LAYER
from planner.models.calibration.pair_losses import layer_losses, measure_pairs
from planner.models.calibration.replay import Replay
from planner.models.running.masked import MaskedExecutor
from planner.planning.budgets import Budget
from planner.planning.pricing import Pricing
from planner.planning.switches import SwitchSet, with_switches
from planner.planning.utilities import load_utilities, save_utilities


@pytest.fixture(scope="module")
def found():
    import torch

    family = FAMILIES["llava"]()
    graph = with_switches(lower_model(family.model, "llava"))
    samples = [sample_of(family.model, family.inputs(seed=seed), (7, 30, 11)) for seed in range(2)]
    additive = calibrate(family.model, graph, samples, method="taylor")
    pairs = measure_pairs(
        family.model, graph, samples, additive.sites, TOKEN_LAYER, additive.selector, batch=3
    )
    masked = MaskedExecutor(family.model, graph)

    def loss(off):
        """Mean KL with some layers off, one row at a time."""
        total = 0.0
        for sample in samples:
            replay = Replay(family.model, masked.layers, sample, 1)
            sites = {graph.sites_by_name[name]: torch.zeros(1, 1) for name in off}
            with torch.no_grad(), masked.using(as_gates(sites)):
                total += float(measure(replay.log_probabilities(0), replay, "kl")[0])
        return total / len(samples)

    return graph, additive, pairs, loss


def test_pairs_are_what_is_lost_together_besides(found):
    _, additive, pairs, loss = found
    for one, other in (("layer.0", "layer.1"), ("layer.1", "layer.3")):
        expected = loss([one, other]) - loss([one]) - loss([other])
        assert pairs.sites[one, other] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    inside = additive.sites["heads.2"].sum() + additive.sites["mlp.2"].sum()
    whole = inside + pairs.sites["heads.2", "mlp.2"]
    assert whole == pytest.approx(loss(["layer.2"]), rel=1e-3, abs=1e-5)
    assert len(pairs.sites) == 6 + 4
    assert pairs.tokens.shape == (4, 4)
    assert np.abs(pairs.tokens[:, [0, 2, 3]]).min() > 0


def test_a_file_keeps_pairs_and_the_problem_has_them(found, tmp_path):
    graph, additive, pairs, _ = found
    utilities = replace(
        additive.utilities("u.npz"),
        pairs=pairs.sites,
        token_fractions=pairs.fractions,
        token_losses=pairs.tokens,
    )
    save_utilities(tmp_path / "u.npz", utilities, graph)
    loaded = load_utilities(tmp_path / "u.npz", graph)
    assert loaded.pairs == pairs.sites
    np.testing.assert_array_equal(loaded.token_losses, pairs.tokens)
    pricing = Pricing(graph, Workload(16, 8), SwitchSet.parse("all"), device("a100-40g"))
    problem = pricing.problem(Budget.of(0.6), loaded)
    assert len(problem.pairs) == 10
    half = next(t for t in problem.tokens if t.keep == (8,))
    measured = pairs.tokens[2]
    lossy = measured >= 0
    np.testing.assert_allclose(half.layer_losses[lossy], measured[lossy])
    # No gain is larger than what its layer is worth.
    assert (half.layer_losses[~lossy] >= measured[~lossy]).all()
    np.testing.assert_allclose(problem.tokens[0].layer_losses, 0)
    heads = replace(pricing, switches=SwitchSet.parse("heads"))
    assert heads.problem(Budget.of(0.9), loaded).pairs == ()


def test_files_whose_pairs_are_of_another_model_are_refused(found, tmp_path):
    graph, additive, _, _ = found
    wrong = replace(additive.utilities("u.npz"), pairs={("layer.0", "layer.9"): 1.0})
    save_utilities(tmp_path / "u.npz", wrong, graph)
    with pytest.raises(InputError, match=r"layer\.9"):
        load_utilities(tmp_path / "u.npz", graph)


def test_layer_losses_do_not_depend_on_the_batch(found):
    graph, *_ = found
    family = FAMILIES["llava"]()
    sample = sample_of(family.model, family.inputs(seed=0), (7, 30, 11))
    masked = MaskedExecutor(family.model, graph)
    sites = graph.sites_of("layer")
    sets = [(0,), (0, 2), (1, 2, 3), (3,)]
    one, four = (
        layer_losses(masked, Replay(family.model, masked.layers, sample, rows), sites, sets)
        for rows in (1, 4)
    )
    np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-6)
