"""Sets of layers that are tried, and what utilities predict of them."""

from dataclasses import replace

import pytest
from families import FAMILIES

from planner.ir.lowering import lower_model
from planner.models.calibration import calibrate, sample_of
from planner.models.calibration.measurement import TOKEN_LAYER
from planner.models.calibration.pair_losses import measure_pairs
from planner.planning.switches import with_switches
from planner.training.experiments.layer_regret import NEIGHBOURS, layer_regret, tried_sets


def test_plans_their_neighbours_and_others_are_tried():
    plans = [(0, 1, 2), (7, 8, 9)]
    found = tried_sets(plans, 12, seed=0)
    assert found == tried_sets(plans, 12, seed=0) == sorted(set(found))
    assert set(plans) < set(found)
    assert all(len(off) == 3 and off == tuple(sorted(set(off))) for off in found)
    near = [off for off in found if any(len({*off} & {*plan}) == 2 for plan in plans)]
    assert len(near) >= 2 * NEIGHBOURS


def test_pairs_measured_on_the_same_sample_predict_two_layers_exactly():
    family = FAMILIES["llava"]()
    graph = with_switches(lower_model(family.model, "llava"))
    samples = [sample_of(family.model, family.inputs(seed=0), (7, 30, 11))]
    alone = calibrate(family.model, graph, samples, method="leave-one-out").utilities("alone")
    pairs = measure_pairs(family.model, graph, samples, alone.sites, TOKEN_LAYER)
    both = replace(alone, name="pairs", pairs=pairs.sites)
    wrong = replace(alone, sites={name: -worth for name, worth in alone.sites.items()})
    off = [(0, 1), (1, 2)]
    found = layer_regret(family.model, graph, samples, {"wrong": wrong, "pairs": both}, off)
    assert found["utilities"]["pairs"]["rank"] == pytest.approx(1.0)
    assert found["utilities"]["wrong"]["rank"] < 0
    assert min(one["regret"] for one in found["utilities"].values()) >= 0
    assert found["best"] > 0
