"""A warm start: what is learned from labels, that it is learned, and runs that stop."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_llava import write_small_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from planner.audit import Labels, Terms, write_labels
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.scheduling import Scheduled, layout_of
from planner.planning.budgets import Budget
from planner.training import adallava
from planner.training.labelling import label_samples
from planner.training.question_samples import Asked, picture_samples, prompt_of, scene_samples
from planner.training.trainer import RunTrainer
from planner.training.warm_start import set_loss, target_plans

BUDGETS = (0.625, 0.75, 0.875)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder, model, processor, graph): eight layers, so four switches of `adallava-l`."""
    folder = write_small_llava(tmp_path_factory.mktemp("base"), layers=8)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    graph = lower_model(model, folder.name)
    return folder, model, AutoProcessor.from_pretrained(folder), graph


def terms_of(graph, switches, **changes):
    fingerprint = str(graph.properties["fingerprint"])
    return Terms("small", fingerprint, switches, "heuristic", 49, 16, **changes)


def measured(small, switches, budgets=BUDGETS, count=1, **changes):
    """Labels of a few scenes."""
    _, model, processor, graph = small
    samples = scene_samples(model, processor, "train", count, 3)
    return label_samples(model, graph, samples, terms_of(graph, switches, **changes), budgets)


def invented(small, count=6):
    """Labels with plans that no loss would give: at each budget others, and not nested."""
    _, model, processor, graph = small
    names = [name for name, _ in scene_samples(model, processor, "train", count, 3)]
    plans = np.array([[0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 1]] * count, dtype=bool)
    sizes = plans.sum(1)
    return Labels(
        terms=terms_of(graph, "adallava-l"),
        switches=tuple(f"layer.{n}" for n in range(4, 8)),
        samples=tuple(name for name in names for _ in BUDGETS),
        budgets=np.array(BUDGETS * count),
        utilities=np.zeros((3 * count, 4)),
        plans=plans,
        costs=sizes,
        limits=sizes,
        losses={},
    )


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def of_heads_and_groups(small, count=3):
    """The same with utilities of heads and MLP groups, at random and at each budget others."""
    labels = invented(small, count)
    names = [
        f"{kind}.{layer}[{index}]"
        for layer in range(8)
        for kind in ("heads", "mlp")
        for index in range(4)
    ]
    worth = np.random.default_rng(0).standard_normal((3, len(names)))
    return replace(
        labels,
        terms=terms_of(small[3], "heads,mlp", mlp_groups=4),
        switches=tuple(names),
        utilities=np.tile(worth, (count, 1)),
        plans=np.ones((len(labels), len(names)), dtype=bool),
    )


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", range(6))
def test_the_loss_is_the_set_s_among_all_of_its_size(held):
    torch.manual_seed(held)
    logits = torch.randn(1, 5, requires_grad=True)
    sets = list(itertools.combinations(range(5), held))
    totals = torch.stack([logits[0, list(s)].sum() for s in sets])
    for chosen, total in zip(sets, totals, strict=True):
        plan = torch.zeros(1, 5, dtype=torch.bool)
        plan[0, list(chosen)] = True
        expected = totals.logsumexp(0) - total
        found = set_loss(logits, plan)
        torch.testing.assert_close(found, expected[None], rtol=1e-5, atol=1e-6)
        slopes = [
            torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (found, expected)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


# -- what is learned -------------------------------------------------------------------------------


def test_labels_of_the_same_switches_say_so_themselves(small):
    layout = layout_of("adallava-l", small[3])
    labels = invented(small)
    assert target_plans(labels, layout) is labels.plans


@pytest.mark.parametrize(
    ("name", "switches", "groups", "limits"),
    [
        ("adallava-l", "layers", None, [1, 2, 3]),
        ("adallava-h", "heads,mlp", 4, [4, 8, 12]),
        ("layers,heads,mlp", "layers,heads,mlp", 4, None),
    ],
)
def test_other_labels_give_the_plans_of_the_scheduler_s_own_rule(
    small, name, switches, groups, limits
):
    layout = layout_of(name, small[3])
    labels = measured(small, switches, mlp_groups=groups)
    # Labels are of eight layers, alike, of which the scheduler has the last four.
    worth = torch.from_numpy(labels.utilities[:, labels.utilities.shape[1] // 2 :])
    limits = limits or [layout.limit(Budget.of(budget)) for budget in BUDGETS]
    plans = torch.from_numpy(target_plans(labels, layout))
    assert plans.tolist() == layout.decide(worth, torch.tensor(limits)).tolist()
    spent = [layout.spent(row) for row in plans]
    assert all(used <= limit for used, limit in zip(spent, limits, strict=True))
    assert len({tuple(row) for row in plans.tolist()}) == 3


def test_labels_that_do_not_fit_are_refused(small):
    graph = small[3]
    units, layers = layout_of("adallava-h", graph), layout_of("adallava-l", graph)
    with pytest.raises(InputError, match=r"for one in heads\.4\[0\]: .* heads,mlp --mlp-groups 4"):
        target_plans(invented(small), units)
    with pytest.raises(InputError, match=r"for one in mlp\.4\[2\]: .* --mlp-groups 4"):
        target_plans(measured(small, "heads,mlp", (0.75,), mlp_groups=2), units)
    with pytest.raises(InputError, match=r"for one in layer\.4: label with --switches adallava-l"):
        target_plans(measured(small, "heads,mlp", (0.75,), mlp_groups=4), layers)


# -- which questions -------------------------------------------------------------------------------


def test_scenes_are_found_by_name(small):
    _, model, processor, _ = small
    known = dict(scene_samples(model, processor, "val", 4, 7))
    asked = Asked(model, processor, known)
    assert [asked(name).digest() for name in known] == [s.digest() for s in known.values()]
    prompt, sample = prompt_of(known["val-question-7-1"], 2), known["val-question-7-1"]
    assert prompt["input_ids"].shape[0] == 2
    assert (
        prompt["input_ids"][1].tolist() == sample.inputs["input_ids"][0, : -sample.answer].tolist()
    )


def test_pictures_are_found_by_what_they_show(small, tmp_path):
    _, model, processor, _ = small
    for number in range(3):
        Image.new("RGB", (56, 56), (80 * number, 9, 9)).save(tmp_path / f"{number}.png")
    lines = [{"image": f"{n}.png", "prompt": "what shape ?", "answer": "no"} for n in range(3)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    some = dict(picture_samples(model, processor, tmp_path, prompts, 2, 5))
    asked = Asked(model, processor, some, tmp_path, prompts)
    assert [asked(name).digest() for name in some] == [s.digest() for s in some.values()]
    with pytest.raises(InputError, match="about a sample '0-00', a name that no question of"):
        Asked(model, processor, ["0-00"], tmp_path, prompts)
    with pytest.raises(InputError, match="a name that no drawn scene has"):
        Asked(model, processor, some)


# -- runs ------------------------------------------------------------------------------------------


def settings(small, folder, labels, **changes):
    write_labels(folder / "labels.parquet", labels)
    values = {
        "model": str(small[0]),
        "labels": str(folder / "labels.parquet"),
        "label_steps": 4,
        "label_learning_rate": 1e-2,
        "label_encoder_learning_rate": 1e-2,
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "batch_size": 3,
        "save_steps": 2,
        "logging_steps": 1,
        **changes,
    }
    return adallava.AdaLlavaConfig(**values)


@pytest.mark.parametrize(
    ("switches", "make"), [("adallava-l", invented), ("adallava-h", of_heads_and_groups)]
)
def test_what_labels_say_is_learned_and_the_model_left_alone(
    small, tmp_path, monkeypatch, switches, make
):
    """The plans are those of inference, too."""
    _, model, processor, graph = small
    labels, steps = make(small, 2), 40
    targets = target_plans(labels, layout_of(switches, graph))
    run = RunTrainer.run
    # The joint training is left out.
    monkeypatch.setattr(
        RunTrainer, "run", lambda self: run(self) if self.args.max_steps == steps else None
    )
    changes = {"label_steps": steps, "save_steps": steps, "label_learning_rate": 1.5e-2}
    config = settings(small, tmp_path, labels, switches=switches, **changes)
    adaptive = adallava.train(config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(adaptive.model.state_dict()[name], tensor), name
    vision = adaptive.model.get_encoder("image")
    frozen = {id(p) for p in vision.parameters()}
    assert all(p.requires_grad == (id(p) not in frozen) for p in adaptive.model.parameters())
    scheduled = Scheduled(adaptive.model, graph, adaptive.scheduler, mask=True)
    asked = Asked(model, processor, labels.samples)
    for name, plans in zip(labels.samples[::3], targets.reshape(2, 3, -1), strict=True):
        with torch.no_grad(), scheduled.using(list(BUDGETS)):
            scheduled.model(**prompt_of(asked(name), 3), use_cache=False)
            assert scheduled.taken.tolist() == plans.tolist()


class Killed(BaseException):
    """Like a signal: not to be caught on the way."""


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return weights(adallava.train(settings(small, folder, invented(small))))


@pytest.mark.parametrize("call", [2, 4, 6], ids=["learning", "learning again", "jointly"])
def test_a_killed_run_resumes_bit_exactly(small, tmp_path, monkeypatch, uninterrupted, call):
    original, calls = RunTrainer.training_step, []

    def killing(self, *args):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(self, *args)

    config = settings(small, tmp_path, invented(small))
    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, "training_step", killing)
        with pytest.raises(Killed):
            adallava.train(config)
    resumed = weights(adallava.train(config))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())


def test_labels_of_another_model_stop_the_training(small, tmp_path):
    labels = invented(small)
    other = write_small_llava(tmp_path / "other", layers=6)
    config = settings(small, tmp_path, labels, model=str(other))
    with pytest.raises(InputError, match="the labels are for 'small'"):
        adallava.train(config)
    assert not Path(config.output_dir).exists()


def test_a_unified_controller_is_taught_by_labels_of_its_other_axes(small, tmp_path):
    """With all image tokens, at budgets that leave room for them."""
    from planner.training import unified

    labels = measured(small, "layers,heads", budgets=(0.4, 0.8), count=2)
    path = tmp_path / "labels.parquet"
    write_labels(path, labels)
    config = unified.UnifiedConfig(
        model=str(small[0]),
        switches="tokens,layers,heads",
        labels=path,
        output_dir=str(tmp_path / "run"),
        label_steps=2,
        batch_size=2,
        save_steps=2,
    )
    torch.manual_seed(0)
    _, adaptive, _ = adallava.build_trainer(config, unified.learner)
    scheduler = adaptive.scheduler
    torch.manual_seed(0)
    config = config.model_copy(update={"labels": None})
    _, other, _ = adallava.build_trainer(config, unified.learner)
    assert not torch.equal(scheduler.head.weight, other.scheduler.head.weight)
    assert torch.equal(scheduler.vision.count.weight, other.scheduler.vision.count.weight)
