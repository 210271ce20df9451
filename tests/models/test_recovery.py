"""Recovery: least squares against lstsq, removal chains against brute force, models that profit."""

import functools
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES
from plans import MLP_SWITCHES, plan_of

import planner
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.calibration import Sample, sample_of
from planner.models.calibration.samples import together
from planner.models.calibration.text import passages, text_samples, written_samples
from planner.models.recovery import (
    chain_of,
    chain_worth,
    refit,
    refitted,
    removal_chain,
    replaced,
    trials,
)
from planner.models.recovery import moments as recovery_moments
from planner.models.recovery.arranging import can_move, moved
from planner.models.recovery.healing import Healing, heal
from planner.models.recovery.moments import RIDGE, Moments, site_moments
from planner.models.recovery.trials import tried_worth
from planner.models.running.bindings import bind
from planner.models.running.program import Program
from planner.models.running.skipping import obeying
from planner.plan import Plan
from planner.planning.switches import with_switches


@functools.cache
def measured(name="llava"):
    family = FAMILIES[name]()
    graph = with_switches(lower_model(family.model, name))
    layers = bind(family.model, graph)
    samples = [sample_of(family.model, family.inputs(seed=seed), (7, 30, 11)) for seed in range(24)]
    return family, graph, layers, samples, site_moments(family.model, layers, samples)


def chains(moments):
    return functools.cache(lambda site: chain_of(site, moments[site.site.name]))


def random_site(features=12, outputs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    rows = torch.randn(400, features, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    g = torch.randn(outputs, outputs, generator=generator, dtype=torch.float64)
    return rows, weight, Moments(rows.T @ rows / len(rows), rows.mean(0), g @ g.T, len(rows))


def test_refit_is_ridge_regression_on_the_kept_features_towards_the_weight():
    rows, weight, moments = random_site()
    kept = torch.tensor([0, 1, 4, 5, 9])
    found = refit(weight, moments.damped(), kept)
    ridge = RIDGE * 12 / len(rows) * moments.inputs.diagonal().mean()
    pull = (len(rows) * ridge).sqrt()
    padded = torch.cat([rows[:, kept], pull * torch.eye(5)])
    target = torch.cat([rows @ weight.T, pull * weight[:, kept].T])
    expected = torch.linalg.lstsq(padded, target).solution.T
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_chain_costs_add_up_to_what_refitting_leaves(seed):
    """Against the error of the best ridge prediction of the removed features, written out."""
    _, weight, moments = random_site(seed=seed)
    groups = list(torch.arange(12).view(4, 3))
    chain = removal_chain(weight, moments, groups)
    order, costs = chain.order.tolist(), chain.costs
    moment = moments.damped()
    for length in range(1, 5):
        removed = torch.cat([groups[g] for g in order[:length]])
        rest = torch.tensor([f for f in range(12) if f not in removed], dtype=torch.long)
        own = moment[removed][:, removed]
        shared = moment[removed][:, rest]
        left = own - shared @ torch.linalg.solve(moment[rest][:, rest], shared.T)
        part = weight[:, removed]
        expected = 0.5 * float((moments.gradients * (part @ left @ part.T)).sum())
        assert sum(costs[:length]) == pytest.approx(expected)


def test_a_feature_that_another_repeats_is_worth_nothing_until_that_is_gone():
    rows, weight, _ = random_site()
    rows[:, 6:9] = rows[:, [5, 3, 4]] * torch.tensor([2.0, -1.0, 0.5])
    known = torch.eye(5, dtype=torch.float64)
    moments = Moments(rows.T @ rows / len(rows), rows.mean(0), known, tokens=10**6)
    chain = removal_chain(weight, moments, list(torch.arange(12).view(4, 3)))
    order, costs = chain.order.tolist(), chain.costs
    assert order[0] in (1, 2)
    assert costs[0] < 0.1 * costs[1]
    assert {1, 2} - {order[0]} != {order[1]}


@pytest.mark.parametrize("graded", [24, 5])
def test_moments_are_those_of_a_plain_loop(monkeypatch, graded):
    """Of samples that gradients are taken of, and of those that only run, several at once."""
    monkeypatch.setattr(recovery_moments, "GRADED", graded)
    family, _, layers, samples, _ = measured()
    moments = site_moments(family.model, layers, samples)
    sink = layers[1].mlp.sink
    rows = []
    hook = sink.module.register_forward_pre_hook(lambda m, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for sample in samples:
            family.model(**sample.inputs)
    hook.remove()
    rows = torch.cat(rows)
    found = moments["mlp.1"]
    # The model multiplies in bfloat16 on some CPUs.
    torch.testing.assert_close(found.inputs, rows.T @ rows / len(rows), rtol=0.03, atol=0.03)
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=0.03, atol=0.03)
    assert all(p.requires_grad for p in family.model.parameters())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_refit_loses_less_and_gives_the_model_back(name):
    family, graph, layers, samples, moments = measured(name)
    before = {n: v.clone() for n, v in family.model.state_dict().items()}
    site = graph.sites_by_name["mlp.2"]
    plan = plan_of(
        graph,
        heads={1: (0,)},
        mlp={2: tuple(range(1, site.switches))},
        mlp_switches={2: site.switches},
    )
    weights = refitted(Program.build([plan], graph, layers), moments, chains(moments))
    assert {name.split(".")[-2] for name in weights} >= {"o_proj", "gate_proj", "down_proj"}

    @torch.no_grad()
    def outputs():
        return [family.model(**sample.inputs).logits.log_softmax(-1) for sample in samples]

    def loss():
        with obeying(family.model, graph, plan):
            found = outputs()
        return sum(float((b.exp() * (b - f)).sum(-1).mean()) for b, f in zip(base, found))

    base = outputs()
    lost = [loss()]
    with replaced(family.model, weights):
        lost.append(loss())
    assert lost[1] < 0.8 * lost[0]
    after = family.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("name", ["llava", "phi"])
def test_a_model_says_the_same_with_its_neurons_in_other_places(name):
    family, _, layers, samples, _ = measured(name)
    for layer in layers:
        assert can_move(layer.mlp)
        places = torch.randperm(
            layer.mlp.site.lanes, generator=torch.Generator().manual_seed(layer.index)
        )
        changed = moved(layer.mlp, places, layer.mlp.sink.weight.detach())
        with torch.no_grad():
            before = family.model(**samples[0].inputs).logits
            with replaced(family.model, changed):
                after = family.model(**samples[0].inputs).logits
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_of_two_thirds_of_the_groups_the_neurons_worth_most_are_kept():
    """Neurons that do nothing are spread over all groups: half of the groups lose nothing."""
    family, graph, layers, samples, _ = measured()
    site, sink = graph.sites_by_name["mlp.1"], layers[1].mlp.sink
    idle = torch.arange(site.lanes) % 2 == 0
    plan = plan_of(graph, mlp={1: (0, 1)}, mlp_switches={1: 4})
    with replaced(family.model, {f"{sink.path}.weight": sink.weight.detach() * ~idle}):
        moments = site_moments(family.model, layers, samples)
        weights = refitted(Program.build([plan], graph, layers), moments, chains(moments))
        with torch.no_grad():
            before = family.model(**samples[0].inputs).logits
            with replaced(family.model, weights), obeying(family.model, graph, plan):
                after = family.model(**samples[0].inputs).logits
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)


def test_chain_worth_values_every_switch_and_layers_as_the_sum():
    _, graph, layers, _, moments = measured()
    worth = chain_worth(graph, layers, chains(moments))
    assert set(worth) == {site.name for site in graph.sites}
    for site in graph.sites:
        assert worth[site.name].shape == (site.switches,)
        assert (worth[site.name] >= 0).all()
    assert worth["layer.1"][0] == pytest.approx(worth["heads.1"].sum() + worth["mlp.1"].sum())


def test_utilities_under_refit_add_up_to_what_narrowing_a_site_loses(monkeypatch):
    """Of a quarter of an MLP's switches, as the skipping model under the plan says."""
    monkeypatch.setattr(trials, "faster_products", lambda model: nullcontext())
    family, graph, layers, samples, moments = measured()
    some, model, chain = samples[:4], family.model, chains(moments)
    before = {name: p.clone() for name, p in model.named_parameters()}
    worth = tried_worth(model, graph, layers, moments, chain, some)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert worth["layer.1"][0] == pytest.approx(worth["heads.1"].sum() + worth["mlp.1"].sum())
    order = np.argsort(worth["mlp.1"], kind="stable")
    count, switches = round(len(order) / 4), len(order)
    kept = tuple(sorted(order[count:].tolist()))
    plan = Plan.of(graph, mlp={1: kept}, mlp_switches={1: switches})
    weights = refitted(Program.build([plan], graph, layers), moments, chain)
    lost = 0.0
    for sample in some:
        answer = slice(-sample.answer - 1, -1)
        with torch.no_grad():
            base = model(**sample.inputs).logits[0, answer].log_softmax(-1)
            with replaced(model, weights), obeying(model, graph, plan):
                found = model(**sample.inputs).logits[0, answer].log_softmax(-1)
        lost += float((base.exp() * (base - found)).sum(-1).mean()) / len(some)
    assert worth["mlp.1"][order[:count]].sum() == pytest.approx(lost, rel=0.01)


def test_samples_of_equal_shapes_run_together():
    def text(first, tokens, answer):
        return Sample({"input_ids": torch.full((1, tokens), first), "use": True}, answer)

    some = [text(0, 5, 4), text(1, 6, 5), text(2, 5, 4), text(3, 5, 2), text(4, 5, 4)]
    found = [
        (one.inputs["input_ids"][:, 0].tolist(), one.answer, one.inputs["use"])
        for one in together(some, 2)
    ]
    assert found == [([0, 2], 4, True), ([4], 4, True), ([1], 5, True), ([3], 2, True)]


def test_passages_are_spread_over_the_text():
    class Letters:
        def __call__(self, text, **_):
            return {"input_ids": [ord(c) for c in text]}

    text = "".join(chr(97 + i // 8) for i in range(200))
    found = passages(Letters(), text, 3, tokens=8)
    assert found.shape == (3, 8)
    assert [len(set(row.tolist())) for row in found] == [1, 1, 1]
    assert found[0, 0] == ord("a")
    assert found[-1, 0] == ord("a") + 24
    assert [s.answer for s in text_samples(found)] == [7, 7, 7]


def test_a_model_writes_its_own_samples_alike_each_time():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()
    state = torch.get_rng_state()
    one, two = (written_samples(model, 3, 9, seed=5) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert [tuple(s.inputs["input_ids"].shape) for s in one] == [(1, 9)] * 3
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(one, two))
    assert not torch.equal(one[0].inputs["input_ids"], one[1].inputs["input_ids"])
    assert np.isfinite(one[0].answer)


@pytest.mark.parametrize("rank", [8, 0])
def test_healing_comes_closer_to_the_base_model_and_gives_the_model_back(rank):
    family, graph, layers, samples, moments = measured()
    before = {n: v.clone() for n, v in family.model.state_dict().items()}
    site = graph.sites_by_name["mlp.2"]
    plan = plan_of(
        graph,
        layers_off=(3,),
        heads={1: (0,)},
        mlp={2: tuple(range(1, site.switches))},
        mlp_switches={2: site.switches},
    )
    weights = refitted(Program.build([plan], graph, layers), moments, chains(moments))
    rate = 1e-2 if rank else 2e-3
    settings = Healing(steps=100, batch=2, rank=rank, learning_rate=rate)
    healed = heal(family.model, graph, plan, weights, samples, settings)
    assert all(torch.equal(before[n], v) for n, v in family.model.state_dict().items())
    assert all(p.requires_grad for p in family.model.parameters())
    # What training masks, running skips: the same numbers.

    @torch.no_grad()
    def distance(some):
        base = [family.model(**s.inputs).logits.log_softmax(-1) for s in samples]
        with replaced(family.model, some), obeying(family.model, graph, plan):
            found = [family.model(**s.inputs).logits.log_softmax(-1) for s in samples]
        return sum(float((b.exp() * (b - f)).sum(-1).mean()) for b, f in zip(base, found))

    assert distance(healed.weights) < 0.4 * distance(weights)
    assert sum(healed.losses[-5:]) < sum(healed.losses[:5])


def test_compensation_adds_the_mean_of_what_is_off_under_every_plan():
    """As masks would, with the mean of the masked neurons instead of zero."""
    family, graph, layers, samples, moments = measured()
    model, inputs = family.model, samples[0].inputs
    sink, bounds = layers[1].mlp.sink, replace(layers[1].mlp.site, switches=MLP_SWITCHES).bounds
    with torch.no_grad():
        base = model(**inputs).logits
    planner.compile(model, 0.9, recover="compensate", inputs=samples, utilities="prior")
    try:
        for kept in ((0, 2, 5), (1,)):
            off = torch.ones(sink.features, dtype=torch.bool)
            for switch in kept:
                off[bounds[switch] : bounds[switch + 1]] = False
            with torch.no_grad(), planner.budget(model, plan_of(graph, mlp={1: kept})):
                found = model(**inputs).logits
            hook = sink.module.register_forward_pre_hook(
                lambda m, args, off=off: torch.where(off, moments["mlp.1"].mean, args[0])
            )
            with torch.no_grad(), planner.budget(model, plan_of(graph)):
                expected = model(**inputs).logits
            hook.remove()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found, base, atol=1e-3)
    finally:
        planner.restore(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_that_is_none_is_told_as_such(rate):
    with pytest.raises(InputError, match="learning rate must be above 0 and finite, not"):
        Healing(learning_rate=rate)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_a_seed_that_no_generator_takes_is_told_as_such(seed):
    with pytest.raises(InputError, match="seed must be at least 0 and below"):
        Healing(seed=seed)
