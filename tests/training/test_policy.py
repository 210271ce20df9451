"""Plans as actions: probabilities are exact, and every method finds the best plan of a toy."""

import copy
import itertools
import math
import shutil

import pytest
import torch
from small_llava import write_small_llava

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.scheduling import layout_of, load_scheduler
from planner.models.scheduling.token_choice import ChosenTokens, kept_counts
from planner.models.scheduling.vision_controller import TokenScores
from planner.planning.budgets import Budget
from planner.planning.catalog import find_model
from planner.planning.graph_cache import lowered_graph
from planner.training import unified
from planner.training.adallava import build_trainer
from planner.training.data.packing import IGNORE
from planner.training.estimators import GumbelSequential
from planner.training.policy import PolicyModel, Reward, TokenDraw, plan_chances
from planner.training.policy_methods import METHODS, Tried, parse
from planner.training.sequential_draws import log_chances, take_best
from planner.training.switch_costs import AdditiveCosts, costs_of

# -- probabilities ---------------------------------------------------------------------------------


def orders_of(costs, limit, size):
    """All orders in which switches can be drawn until nothing fits."""
    taken, left = torch.zeros(1, size, dtype=torch.bool), limit
    found = []

    def extend(order, taken, left):
        price = costs.of_next(taken)[0]
        fits = [n for n in range(size) if not taken[0, n] and int(price[n]) <= left]
        if not fits:
            found.append(order)
        for n in fits:
            more = taken.clone()
            more[0, n] = True
            extend([*order, n], more, left - int(price[n]))

    extend([], taken, left)
    return found


def test_probabilities_of_all_plans_add_up_to_one():
    """Token counts, sets of tokens, layers: every order of every plan, as the policy draws them."""
    graph = lowered_graph(find_model("tiny-llava", False))[0]
    load = Workload.default(graph, 3, 16, 0)
    layout = layout_of("tokens,layers", graph).under(load)
    limit = torch.tensor([layout.limit(Budget.of(0.75))])
    torch.manual_seed(0)
    image = torch.tensor([[False, True, True, True, False]])
    counts, tokens = torch.randn(1, layout.choices), torch.randn(1, 5)
    scores = TokenScores(counts, tokens, image, image.float())
    logits = torch.randn(1, layout.size)
    total, plans = 0.0, {}
    for option in layout.open_counts(limit)[0].nonzero().flatten().tolist():
        options = torch.tensor([option])
        kept = int(kept_counts(layout, options, image))
        left = layout.left(limit, options)
        switches = orders_of(costs_of(layout, options), int(left), layout.size)
        for order in itertools.permutations((1, 2, 3), kept):
            keep = ~image
            keep[0, list(order)] = True
            draw = TokenDraw(
                ChosenTokens(options, keep),
                torch.tensor([order]),
                [torch.tensor([each]) for each in switches],
            )
            rows = plan_chances(layout, draw, scores, logits, limit)
            for each, chances in zip(switches, rows, strict=True):
                chance = float(chances.sum().exp())
                plan = option, frozenset(order), frozenset(each)
                plans[plan] = plans.get(plan, 0) + chance
                total += chance
    assert len(plans) > 50
    assert total == pytest.approx(1, abs=1e-4)
    for option, _, taken in plans:
        row = torch.zeros(1 + layout.size, dtype=torch.long)
        row[0] = layout.counts[option]
        row[[1 + n for n in taken]] = 1
        assert layout.spent(row) <= int(limit)


# -- methods on a toy ------------------------------------------------------------------------------

PRICES = torch.tensor([[3, 2, 2, 1, 1]])
LIMIT = 5


def worth(taken):
    """Of plans (plans, 5), bool: pairs are worth what their switches alone are not."""
    gates = taken.float()
    alone = gates @ torch.tensor([0.6, 0.3, 0.3, 0.4, 0.1])
    return alone + 0.8 * gates[:, 1] * gates[:, 2] - 0.5 * gates[:, 0] * gates[:, 3]


def best_plan():
    plans = torch.tensor(list(itertools.product([False, True], repeat=5)))
    fits = (plans * PRICES).sum(1) <= LIMIT
    return plans[fits][worth(plans[fits]).argmax()]


@pytest.mark.parametrize("method", ["reinforce", "grpo", "ppo:epochs=2", "imitation"])
def test_every_method_finds_the_best_plan(method):
    """It is none that the switches' own worth would say: greedily, the first comes first."""
    torch.manual_seed(0)
    method = parse(method)
    logits = torch.zeros(1, 5, requires_grad=True)
    critic = torch.zeros(1, requires_grad=True)
    costs, limits = AdditiveCosts(PRICES), torch.full((8,), LIMIT)
    optimiser = torch.optim.Adam([logits, critic], lr=0.1)
    for _ in range(150):
        with torch.no_grad():
            drawn = GumbelSequential().draw(logits.expand(8, -1), costs, limits)
            rewards = worth(drawn.taken)[:, None]
            before = log_chances(drawn.order, logits.expand(8, -1), costs, limits)[:, None]
        for _ in range(method.epochs):
            now = log_chances(drawn.order, logits.expand(8, -1), costs, limits)[:, None]
            loss = method.loss(Tried(now, before, None, rewards, critic))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    best = best_plan()
    assert worth(best[None]) > worth(torch.tensor([[True, True, False, False, False]]))
    found = take_best(logits, torch.zeros(1, 5, dtype=torch.bool), costs, limits[:1])
    assert torch.equal(found[0], best)
    drawn = GumbelSequential().draw(logits.detach().expand(400, -1), costs, limits[:1].expand(400))
    assert (drawn.taken == best).all(1).float().mean() > 0.6


def test_divergence_pulls_back_to_the_reference():
    method = parse("reinforce:kl=1")
    now = torch.tensor([[[-0.5, -0.7]]], requires_grad=True)
    same = Tried(now, now.detach(), now.detach(), torch.ones(1, 1), torch.zeros(1))
    far = Tried(now, now.detach(), now.detach() - 1, torch.ones(1, 1), torch.zeros(1))
    assert method.loss(same) - parse("reinforce").loss(same) == 0
    assert method.loss(far) - parse("reinforce").loss(far) > 0.5
    # A draw that is likelier than under the reference is pushed down.
    (pushed,) = torch.autograd.grad(method.loss(far) - parse("reinforce").loss(far), now)
    assert (pushed > 0).all()


def test_clipped_ratios_have_no_gradient():
    now = torch.tensor([[[-0.1]], [[-2.0]]], requires_grad=True)
    before = torch.tensor([[[-1.0]], [[-1.0]]])
    tried = Tried(now, before, None, torch.tensor([[1.0], [-1.0]]), torch.zeros(1))
    parse("grpo").loss(tried).backward()
    assert not now.grad.any()


@pytest.mark.parametrize("name", METHODS)
def test_names_round_trip(name):
    assert parse(str(parse(f"{name}:kl=0.1"))) == parse(f"{name}:kl=0.1")


def test_bad_settings_are_one_sentence():
    for text, message in (
        ("a2c", "There is no way to train a policy 'a2c'"),
        ("grpo:clip=0", "clip is more than 0"),
        ("ppo:epochs=0", "epochs is a count from 1 on"),
    ):
        with pytest.raises(InputError, match=message):
            parse(text)
    with pytest.raises(InputError, match="unknown reward 'bleu'"):
        Reward("bleu")


def test_rewards_are_likelihood_or_right_answers_less_cost():
    logits = torch.zeros(2, 4, 5)
    logits[0, 1, 3] = logits[0, 2, 1] = 9.0
    labels = torch.tensor([[IGNORE, IGNORE, 3, 1], [IGNORE, IGNORE, 3, 1]])
    free, half = torch.zeros(2), torch.full((2,), 0.5)
    assert Reward("correct").of(logits, labels, free).tolist() == [1, 0]
    assert Reward("correct", 0.2).of(logits, labels, half).tolist() == pytest.approx([0.9, -0.1])
    found = Reward("nll").of(logits, labels, free)
    assert found[0] > -0.01
    assert float(found[1]) == pytest.approx(-math.log(5), abs=1e-5)


# -- on a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_llava(tmp_path_factory.mktemp("base"))


def settings(base, folder, **changes):
    common = {"max_steps": 2, "batch_size": 3, "save_steps": 1, "logging_steps": 1}
    return unified.UnifiedConfig(
        model=str(base),
        output_dir=str(folder),
        **common | {"learning_rate": 1e-2, "least_budget": 0.4, "text_tokens": 16} | changes,
    )


def batch_of(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    batch.pop("ids")
    return batch


@pytest.mark.parametrize(
    ("switches", "method"),
    [
        ("tokens,layers,heads,mlp", "grpo:kl=0.1"),
        ("tokens,heads:scorer=uniform", "ppo"),
        ("tokens,layers,heads:scorer=all", "reinforce"),
        ("tokens", "imitation"),
    ],
)
def test_the_policy_learns_and_the_model_does_not(base, switches, method):
    config = settings(base, "unused", switches=switches, method=method, least_budget=0.6)
    trainer, policy, _ = build_trainer(config, unified.learner)
    assert isinstance(policy, PolicyModel)
    policy(**batch_of(trainer))["loss"].backward()
    learned = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(name.startswith(("scheduler.", "critic.")) for name in learned)
    if policy.scheduler.head is not None:
        assert {"scheduler.head.weight", "scheduler.encoder.second.weight"} <= learned
    if policy.scheduler.vision is not None:
        # Without switches a budget leaves one token count open.
        assert ("scheduler.vision.count.weight" in learned) == (policy.layout.size > 0)
        scored = "scheduler.vision.score.weight" in learned
        assert scored == ("uniform" not in switches)
    assert policy.tally[2] == 0


def test_pictures_are_encoded_once_and_lower_layers_once_for_a_set_of_tokens(base):
    config = settings(base, "unused", method="grpo:kl=0.1", token_draws=2, switch_draws=3)
    trainer, policy, _ = build_trainer(config, unified.learner)
    calls = {"tower": 0, "lower": 0, "upper": 0}

    def counting(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    layers = policy.model.get_decoder().layers
    attention = [layer.self_attn for layer in layers]
    hooks = [
        policy.model.get_encoder("image").register_forward_hook(counting("tower")),
        attention[0].register_forward_hook(counting("lower")),
        attention[-1].register_forward_hook(counting("upper")),
    ]
    policy(**batch_of(trainer))
    for hook in hooks:
        hook.remove()
    # Two sets of tokens are tried, and looked up as drawn, under the reference and now.
    assert calls == {"tower": 1, "lower": 2 * 4, "upper": 2 * 3}


def test_what_is_shared_changes_no_reward(base, monkeypatch):
    import contextlib

    from planner.training import policy as module

    rewards = []
    for shared in (True, False):
        if not shared:
            for name in ("_lower_layers_once", "pictures_once"):
                monkeypatch.setattr(module, name, lambda _: contextlib.nullcontext())
        torch.manual_seed(0)
        config = settings(base, "unused", method="reinforce", switch_draws=3)
        trainer, policy, _ = build_trainer(config, unified.learner)
        policy(**batch_of(trainer))
        rewards.append(policy._tried[1])
    assert rewards[0].shape == (6, 3)
    assert rewards[0].unique().numel() > 6
    assert torch.allclose(rewards[0], rewards[1], atol=1e-5)


def test_a_policy_that_was_stopped_goes_on_bit_exactly(base, tmp_path):
    changes = {"method": "ppo:epochs=2", "max_steps": 3}
    whole = unified.train(settings(base, tmp_path / "whole", **changes))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    parts = unified.train(settings(base, tmp_path / "parts", **changes))
    assert (tmp_path / "parts" / "checkpoint-3").is_dir()
    for (name, one), two in zip(
        whole.state_dict().items(), parts.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name


def test_several_updates_with_each_batch_gather_no_batches(base):
    with pytest.raises(InputError, match="2 updates with each batch, so it cannot gather 2"):
        settings(base, "unused", method="ppo:epochs=2", gradient_accumulation_steps=2)
    build_trainer(
        settings(base, "unused", method="ppo", gradient_accumulation_steps=1), unified.learner
    )


def test_one_run_starts_from_another(base, tmp_path):
    first = settings(base, tmp_path / "a", method="gumbel", export_dir=str(tmp_path / "model"))
    trained = unified.train(first)
    second = settings(base, tmp_path / "b", method="grpo", start=str(tmp_path / "model"))
    _, policy, _ = build_trainer(unified.started(second), unified.learner)
    for name, tensor in trained.scheduler.state_dict().items():
        assert torch.equal(policy.scheduler.state_dict()[name], tensor)
        assert torch.equal(policy.reference.state_dict()[name], tensor)
    other = settings(base, tmp_path / "c", switches="tokens", start=str(tmp_path / "model"))
    with pytest.raises(InputError, match="is of tokens,layers,heads,mlp, and the configuration"):
        build_trainer(unified.started(other), unified.learner)
    model = copy.deepcopy(trained.model)
    graph = lower_model(model, "small")
    assert load_scheduler(tmp_path / "model", graph).vision is not None


@pytest.mark.parametrize("method", ["gumbel:temperature=2", "gumbel-topk", "simple"])
def test_an_estimator_s_gradient_reaches_both_sides_and_the_model(base, method):
    switches = "tokens,heads,mlp" if method == "simple" else "tokens,layers,heads,mlp"
    config = settings(base, "unused", switches=switches, method=method)
    trainer, adaptive, _ = build_trainer(config, unified.learner)
    adaptive(**batch_of(trainer)).loss.backward()
    for part in (
        adaptive.scheduler.head.weight,
        adaptive.scheduler.encoder.second.weight,
        adaptive.scheduler.vision.count.weight,
        adaptive.scheduler.vision.features.weight,
        adaptive.model.lm_head.weight,
    ):
        assert part.grad.any()
    assert adaptive.tally[2] == 0
    assert adaptive.tally[1] / adaptive.tally[0] > 0.9
