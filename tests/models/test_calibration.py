"""Utilities by calibration: planted switches, naive twins, resumption, and plans that profit."""

import copy
import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES
from plans import plan_of

from planner.cli import execute as run
from planner.ir.cost import Workload
from planner.ir.cost.device_table import device
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.calibration import Sample, calibrate, read_questions, sample_of
from planner.models.calibration.leave_one_out import as_gates, losses_without, measure, switches_of
from planner.models.calibration.measurement import not_negative
from planner.models.calibration.replay import Replay
from planner.models.calibration.store import Store
from planner.models.calibration.taylor import taylor
from planner.models.calibration.token_worth import fit
from planner.models.running.masked import MaskedExecutor
from planner.models.running.skipping import session_on
from planner.plan import TokenStage
from planner.planning.budgets import Budget
from planner.planning.catalog import tiny_llava_folder
from planner.planning.pricing import Pricing
from planner.planning.switches import SwitchSet, with_switches
from planner.planning.utilities import Utilities, load_utilities, save_utilities
from planner.solver import solve
from planner.solver.problem import Choice


@functools.cache
def planted():
    """A LLaVA of which layer 1 has a head (KV group) and layer 2 an MLP group without effect."""
    family = FAMILIES["llava"]()
    graph = with_switches(lower_model(family.model, "llava"))
    layers = family.model.model.language_model.layers
    with torch.no_grad():
        # Two query heads of 16 features each per KV group; 96 neurons in 4 groups.
        layers[1].self_attn.o_proj.weight[:, 32:64] = 0
        layers[1].self_attn.o_proj.weight[:, :32] *= 2
        layers[2].mlp.down_proj.weight[:, 24:48] = 0
    return family, graph


def samples_of(family, count=2, answer=(7, 30, 11)):
    return [sample_of(family.model, family.inputs(seed=seed), answer) for seed in range(count)]


def switch_off(graph, switch):
    """A plan with one switch off."""
    site = switch.site
    if site.kind == "layer":
        return plan_of(graph, layers_off=(site.layer,))
    kept = {site.layer: tuple(u for u in range(site.switches) if u != switch.index)}
    if site.kind == "heads":
        return plan_of(graph, heads=kept)
    return plan_of(graph, mlp=kept, mlp_switches={site.layer: site.switches})


@torch.no_grad()
def naive(model, session, plan, sample, kind):
    """Loss change or KL of one sample under a plan, without any sharing of work."""

    def log_probabilities():
        logits = model(**sample.inputs).logits
        return logits[0, -sample.answer - 1 : -1].double().log_softmax(-1)

    base = log_probabilities()
    with session.under(plan):
        found = log_probabilities()
    if kind == "kl":
        return float((base.exp() * (base - found)).sum(-1).mean())
    index = sample.labels[:, None]
    return float((base.gather(-1, index) - found.gather(-1, index)).mean())


@pytest.mark.parametrize("kind", ["loss", "kl"])
@pytest.mark.parametrize("each_family", ["llava", "qwen3_vl", "gemma3", "phi"], indirect=True)
def test_leave_one_out_equals_one_narrowed_run_per_switch(each_family, kind):
    family, graph = each_family
    graph = with_switches(graph)
    sample = samples_of(family, 1)[0]
    switches = switches_of(graph)
    masked, session = MaskedExecutor(family.model, graph), session_on(family.model, graph)
    replay = Replay(family.model, masked.layers, sample, 5)
    # The first and the last, and one that shares its batch with later layers.
    for start in (0, 8, len(switches) - 4):
        some = switches[start : start + 4]
        found = losses_without(masked, replay, [[switch] for switch in some], kind)
        for switch, value in zip(some, found, strict=True):
            plan = switch_off(graph, switch)
            expected = naive(family.model, session, plan, sample, kind)
            assert value == pytest.approx(expected, rel=1e-3, abs=2e-5)


def test_image_features_are_computed_once_per_sample(llava):
    family, graph = llava
    calls = []
    tower = family.model.model.vision_tower
    hook = tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        masked = MaskedExecutor(family.model, graph)
        replay = Replay(family.model, masked.layers, samples_of(family, 1)[0], 3)
        for _ in range(2):
            some = [[switch] for switch in switches_of(graph)[:3]]
            losses_without(masked, replay, some, "kl")
    finally:
        hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("measure", ["loss", "kl"])
def test_switches_without_effect_are_worth_nothing_and_doubled_ones_much(measure):
    family, graph = planted()
    found = calibrate(family.model, graph, samples_of(family), measure=measure)
    for method in (found, calibrate_taylor(family, graph, measure)):
        sites = method.sites
        assert abs(sites["heads.1"][1]) < 1e-6
        assert abs(sites["mlp.2"][1]) < 1e-6
        assert abs(sites["heads.1"][0]) > 1e-2
        assert set(sites) == {site.name for site in graph.sites}
        assert all(len(sites[site.name]) == site.switches for site in graph.sites)
    if measure == "kl":
        assert all((values >= -1e-6).all() for values in found.sites.values())
        assert found.rank_correlation["all"] > 0.6


def calibrate_taylor(family, graph, measure):
    return calibrate(family.model, graph, samples_of(family), measure=measure, method="taylor")


def test_taylor_with_answers_is_the_derivative_with_its_sign(llava):
    family, graph = llava
    graph = with_switches(graph)
    sample = samples_of(family, 1)[0]
    masked = MaskedExecutor(family.model, graph)
    replay = Replay(family.model, masked.layers, sample, 1)
    switches = switches_of(graph)
    estimate = taylor(masked, replay, switches, "loss", 0)
    # A linear that adds a little less of a switch is that switch's gate a little below 1.
    for index in (1, 6, len(switches) - 1):
        site, step = switches[index].site, 2e-2
        layer = family.model.model.language_model.layers[site.layer]
        sink = layer.self_attn.o_proj if site.kind == "heads" else layer.mlp.down_proj
        width = sink.in_features // site.switches
        part = slice(switches[index].index * width, (switches[index].index + 1) * width)
        original = sink.weight.detach().clone()
        losses = []
        for scale in (1 + step, 1 - step):
            with torch.no_grad():
                sink.weight[:, part] *= scale
                logits = family.model(**sample.inputs).logits[0, -sample.answer - 1 : -1]
                losses.append(torch.nn.functional.cross_entropy(logits.double(), sample.labels))
                sink.weight.copy_(original)
        slope = float(losses[1] - losses[0]) / (2 * step)
        assert estimate[index] == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_fisher_estimates_the_divergence_of_a_small_step(llava):
    # KL at a gate of 1 - e is e^2 times half the information: the estimate, for a gate of 0, is
    # that without e^2. Many draws, so that chance matters little.
    family, graph = llava
    sample = samples_of(family, 1)[0]
    masked = MaskedExecutor(family.model, graph)
    switches = [s for s in switches_of(graph) if s.site.kind == "heads"]
    estimate = taylor(masked, Replay(family.model, masked.layers, sample, 512), switches, "kl", 0)
    replay = Replay(family.model, masked.layers, sample, 1)
    step = 0.05
    for index in (0, 3, 5):
        site = switches[index].site
        gates = torch.ones(1, site.switches)
        gates[0, switches[index].index] -= step
        with torch.no_grad(), masked.using(as_gates({site: gates})):
            found = measure(replay.log_probabilities(0), replay, "kl")
        assert estimate[index] == pytest.approx(float(found) / step**2, rel=0.25)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 20, 60])
def test_a_killed_run_continues_to_the_same_bytes(tmp_path, stop_at):
    family, graph = planted()
    samples = samples_of(family)
    partial = tmp_path / "u.npz.partial"

    def run(**options):
        return calibrate(family.model, graph, samples, batch=8, seed=3, **options)

    def write(found, path):
        values = Utilities("u", found.sites, found.tokens, found.saturation)
        save_utilities(path, values, graph, json.dumps(found.rank_correlation))
        return path.read_bytes()

    def stop(done, total):
        if done >= stop_at:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(partial=partial, progress=stop)
    assert partial.exists()
    measured = []
    found = run(partial=partial, progress=lambda done, total: measured.append((done, total)))
    # Nothing is measured twice, and all of it in the end.
    assert measured[0][0] > stop_at
    assert measured[-1][0] == measured[-1][1]
    assert write(found, tmp_path / "a.npz") == write(run(), tmp_path / "b.npz")


def test_partial_results_of_another_run_are_refused(tmp_path):
    family, graph = planted()
    samples, partial = samples_of(family), tmp_path / "u.npz.partial"

    def stop(done, total):
        raise Interrupted

    def run(samples, **options):
        return calibrate(family.model, graph, samples, method="taylor", partial=partial, **options)

    with pytest.raises(Interrupted):
        run(samples, progress=stop)
    for other in ({"seed": 1}, {"measure": "loss"}, {"batch": 3}):
        with pytest.raises(InputError, match="other options"):
            run(samples, **other)
    with pytest.raises(InputError, match="other samples"):
        run(samples_of(family, answer=(8, 9)))
    for parameter in family.model.parameters():
        changed = copy.deepcopy(parameter.detach())
        with torch.no_grad():
            parameter[-1].mul_(1.5).add_(1)
        with pytest.raises(InputError, match="another model"):
            run(samples)
        with torch.no_grad():
            parameter.copy_(changed)
    partial.write_bytes(b"PK")
    with pytest.raises(InputError, match="delete it"):
        run(samples)


def test_noise_below_zero_becomes_small_and_positive():
    generator = np.random.default_rng(0)
    means = np.array([0.5, 0.01, 0.0, -0.01, -0.5, 0.0])
    effects = means + 0.1 * generator.standard_normal((64, 6))
    effects[:, 5] = 0
    found, error = not_negative(effects), 0.1 / 8
    assert found[0] == pytest.approx(effects[:, 0].mean(), rel=1e-6)
    assert ((found[1:5] > 0) & (found[1:5] < 3 * error)).all()
    assert found[5] == 0
    # Against drawing from the normal distribution and keeping what is positive.
    mean, sigma = effects[:, 2].mean(), effects[:, 2].std(ddof=1) / 8
    drawn = generator.normal(mean, sigma, 200_000)
    assert found[2] == pytest.approx(drawn[drawn > 0].mean(), rel=0.02)
    assert not_negative(np.array([[-1.0, 2.0]])).tolist() == [0, 2]


def test_the_curve_of_image_tokens_is_found_again():
    fractions = np.array([0.125, 0.25, 0.5, 0.75])
    for tokens, saturation in ((2.0, 31.0), (0.3, 2.0)):
        right = Utilities("", {}, tokens, saturation)
        losses = tokens - np.array([right.of_tokens(r) for r in fractions])
        assert fit(fractions, losses) == pytest.approx((tokens, saturation), rel=1e-2)
    assert fit(fractions, -np.ones(4))[0] == 0


def test_token_losses_are_those_of_the_plans():
    family, graph = planted()
    sample = samples_of(family, 1)[0]
    found = calibrate(family.model, graph, [sample])
    assert found.selector == "fastv"
    session = session_on(family.model, graph)
    # Tokens are left out by what the prompt attends to, and an answer is none of it.
    sample = replace(sample, inputs={**sample.inputs, "logits_to_keep": sample.answer + 1})
    for fraction, lost in found.token_losses:
        stage = TokenStage(2, round(fraction * 16), 16, "fastv")
        expected = naive(family.model, session, plan_of(graph, tokens=(stage,)), sample, "kl")
        assert lost == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_model_without_images_has_no_worth_of_tokens(each_text_model):
    family, graph = each_text_model
    found = calibrate(family.model, graph, samples_of(family, 1), method="taylor")
    assert (found.tokens, found.saturation, found.selector) == (0, None, "")
    assert found.rank_correlation == {}


@pytest.fixture
def each_text_model():
    family = FAMILIES["qwen3"]()
    return family, with_switches(lower_model(family.model, "qwen3"))


def test_calibrated_plans_beat_random_ones_at_equal_budget():
    family, graph = planted()
    train, held_out = samples_of(family, 4), [
        sample_of(family.model, family.inputs(seed=seed), (5, 40)) for seed in range(90, 94)
    ]  # fmt: skip
    found = calibrate(family.model, graph, train, batch=32)
    utilities = Utilities("measured", found.sites, found.tokens, found.saturation)
    pricing = Pricing(
        graph, Workload.default(graph), SwitchSet.parse("heads,mlp"), device("a100-40g"), "llm"
    )
    session = session_on(family.model, graph)

    def distance(choice):
        kept = {name: tuple(sorted(chosen)) for name, chosen in choice.kept.items()}
        plan = plan_of(
            graph,
            heads={s.layer: kept[s.name] for s in graph.sites_of("heads")},
            mlp={s.layer: kept[s.name] for s in graph.sites_of("mlp")},
            mlp_switches={s.layer: s.switches for s in graph.sites_of("mlp")},
        )
        return np.mean([naive(family.model, session, plan, s, "kl") for s in held_out])

    generator = np.random.default_rng(0)
    for budget in (0.7, 0.85):
        problem = pricing.problem(Budget.of(budget), utilities)
        ours = distance(solve(problem).choice)
        others = [distance(random_choice(problem, generator)) for _ in range(8)]
        assert ours < np.mean(others)
        assert ours < np.median(others)


def random_choice(problem, generator):
    """Switches off one after another, at random, until the budget is met."""
    choice = Choice.everything(problem)
    kept = {name: list(chosen) for name, chosen in choice.kept.items()}
    while not problem.is_feasible(
        replace(choice, kept={name: tuple(chosen) for name, chosen in kept.items()})
    ):
        name = generator.choice([name for name, chosen in kept.items() if chosen])
        kept[name].pop(generator.integers(len(kept[name])))
    return replace(choice, kept={name: tuple(chosen) for name, chosen in kept.items()})


def test_a_file_is_for_its_own_model(tmp_path):
    _, graph = planted()
    other = graph.replacing(graph.operators)
    other = replace(other, name="other", properties={**graph.properties, "fingerprint": "f00"})
    sites = {site.name: np.arange(site.switches, dtype=float) for site in graph.sites}
    path = tmp_path / "u.npz"
    save_utilities(path, Utilities("u", sites, 1.5, 7.0), graph, "where from")
    read = load_utilities(path, graph)
    assert (read.tokens, read.saturation) == (1.5, 7.0)
    assert all((read.of_site(site) == sites[site.name]).all() for site in graph.sites)
    with pytest.raises(InputError, match=r"measured on another model .*'other' \(f00\)"):
        load_utilities(path, other)
    np.savez(tmp_path / "v.npz", **{"heads.99": np.ones(2)})
    with pytest.raises(InputError, match=r"heads\.99, which 'llava' does not have"):
        load_utilities(tmp_path / "v.npz", graph)


def test_a_layer_is_worth_what_was_measured_of_it_as_a_whole():
    _, graph = planted()
    sites = {site.name: np.ones(site.switches) for site in graph.sites} | {"layer.1": np.array([9])}
    here = graph.sites_at(1)
    assert Utilities("measured", sites, 0).of_layer(here) == 9
    del sites["layer.1"]
    inside = sum(site.switches for site in here if site.kind != "layer")
    assert Utilities("measured", sites, 0).of_layer(here) == inside


@pytest.fixture
def folder(tmp_path):
    """The shipped model's images, questions and a way to run commands there."""
    from planner.training.data import SceneQuestions

    with (tmp_path / "prompts.jsonl").open("w") as lines:
        for number, sample in enumerate(SceneQuestions("val", 3)):
            sample.image.save(tmp_path / f"{number}.png")
            turn = sample.turns[0]
            record = {"image": f"{number}.png", "prompt": turn.question, "answer": turn.answer}
            lines.write(json.dumps(record) + "\n")
    return tmp_path


def test_from_images_to_a_checkpoint_on_the_command_line(folder, capsys):
    def command(*arguments):
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    model, utilities = ("--model", "tiny-llava"), folder / "u.npz"
    asked = ("calibrate-utilities", *model, "--images", folder, "-o", utilities, "--samples", 2)
    code, out, err = command(*asked, "--prompts", folder / "prompts.jsonl", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["samples"], found["measure"], found["switches"]) == (2, "loss", 8 * (1 + 8 + 3))
    assert set(found["rank_correlation"]) == {"all", "layer", "heads", "mlp"}
    assert found["tokens"]["selector"] == "fastv"
    code, out, err = command(*asked, "--method", "taylor", "-q")
    assert (code, out, err) == (0, "", "")
    code, out, err = command(*asked, "--measure", "loss")
    assert (code, out) == (2, "")
    assert "needs answers" in err
    plan = ("compile", *model, "--utilities", utilities, "--switches", "layers", "--budget", 0.8)
    assert command(*plan, "-o", folder / "plan", "-q")[0] == 0
    export = ("export", *model, "--plan", folder / "plan/plan.yaml", "-o", folder / "smaller")
    code, out, err = command(*export)
    assert code == 0, err
    assert "stock transformers loads it" in out
    assert (folder / "smaller/tokenizer.json").is_file()
    weights = folder / "smaller/model.safetensors"
    assert weights.stat().st_size < (tiny_llava_folder() / "model.safetensors").stat().st_size
    code, out, err = command(*export)
    assert (code, out) == (2, "")
    assert "not empty" in err
    code, _, err = command("compile", "--model", "mipha-3b", "--utilities", utilities)
    assert code == 2
    assert "another model" in err


def test_ctrl_c_says_how_to_go_on(folder, capsys, monkeypatch):
    output = folder / "u.npz"
    asked = ["calibrate-utilities", "--model", "tiny-llava", "--images", str(folder)]
    asked += ["-o", str(output), "--method", "taylor"]

    class Stopped(Store):
        def save(self, now: bool = False) -> None:
            super().save(now)
            if not now:
                raise KeyboardInterrupt

    monkeypatch.setattr("planner.models.calibration.measurement.Store", Stopped)
    assert run(asked) == 130
    assert not output.exists()
    kept, last = capsys.readouterr().err.strip().splitlines()[-2:]
    assert kept.endswith("u.npz.partial': the same command goes on from there")
    assert last == "planner: interrupted"
    monkeypatch.undo()
    assert run([*asked, "-q"]) == 0
    assert output.exists()
    assert not (folder / "u.npz.partial").exists()


def test_bad_arguments_and_broken_weights():
    family, graph = planted()
    samples = samples_of(family, 1)
    with pytest.raises(InputError, match="unknown method"):
        calibrate(family.model, graph, samples, method="guess")
    with pytest.raises(InputError, match="unknown measure"):
        calibrate(family.model, graph, samples, measure="taste")
    with pytest.raises(InputError, match="at least one sample"):
        calibrate(family.model, graph, [])
    with pytest.raises(InputError, match="not a batch of 2"):
        sample_of(family.model, family.inputs(batch=2), (3,))
    broken = Sample(
        {**samples[0].inputs, "pixel_values": samples[0].inputs["pixel_values"] * float("nan")}, 3
    )
    with pytest.raises(InputError, match="not finite"):
        calibrate(family.model, graph, [broken], method="taylor")


def test_questions(tmp_path):
    images, prompts = tmp_path / "images", tmp_path / "prompts.jsonl"
    images.mkdir()
    with pytest.raises(InputError, match="no images"):
        read_questions(images, None)
    (images / "b.PNG").write_bytes(b"")
    (images / "a.jpg").write_bytes(b"")
    (images / "notes.txt").write_bytes(b"")
    assert [q.image.name for q in read_questions(images, None)] == ["a.jpg", "b.PNG"]
    prompts.write_text('{"image": "a.jpg", "prompt": "What?", "answer": "That."}\n\n')
    question = read_questions(images, prompts)[0]
    assert (question.image, question.prompt, question.answer) == (
        images / "a.jpg",
        "What?",
        "That.",
    )
    for text, reason in (
        ("", "is empty"),
        ("{", "line 1 .* is truncated or not JSON"),
        ("[]", "not of the form"),
        ('{"image": "a.jpg", "prompt": 3}', "must be text"),
        ('{"image": "a.jpg", "answer": " "}', "answer .* is empty"),
        ('{"image": "a.jpg", "image": "b.PNG"}', "line 1 .* has the key image twice"),
        ('{"image": "a.jpg", "answer": "x"}\n{"image": "b.PNG"}', "1 of 2 lines"),
    ):
        prompts.write_text(text)
        with pytest.raises(InputError, match=reason):
            read_questions(images, prompts)
    with pytest.raises(InputError, match="no folder of images"):
        read_questions(tmp_path / "absent", None)
    with pytest.raises(InputError, match="no prompts file"):
        read_questions(images, tmp_path / "absent")
