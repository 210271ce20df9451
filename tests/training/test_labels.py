"""Labels: measured losses are those of narrowed runs, and what is decided keeps to its limit."""

import copy
import functools
import shutil

import numpy as np
import pytest
import torch
from families import FAMILIES
from plans import plan_of

from planner.audit import Terms, audit, read_labels
from planner.audit.surrogate import all_plans
from planner.cli import execute as run
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.calibration import sample_of
from planner.models.running.skipping import session_on
from planner.models.scheduling import Scheduled, Scheduler
from planner.planning.catalog import tiny_llava_folder
from planner.training.labelling import label_samples

BUDGETS = (0.5, 0.75, 1.0)


@functools.cache
def small():
    """(model, graph, samples): a LLaVA of four layers."""
    family = FAMILIES["llava"]()
    graph = lower_model(family.model, "llava")
    samples = [
        (f"sample {seed}", sample_of(family.model, family.inputs(seed=seed), (7, 30, 11)))
        for seed in range(3)
    ]
    return family.model, graph, samples


def terms_of(graph, switches, **changes):
    fingerprint = str(graph.properties["fingerprint"])
    return Terms("llava", fingerprint, switches, "heuristic", 16, 8, **changes)


@torch.no_grad()
def loss_under(model, session, plan, sample):
    """By narrowed layers, without any sharing of work."""
    with session.under(plan):
        logits = model(**sample.inputs).logits[0, -sample.answer - 1 : -1].double()
    return torch.nn.functional.cross_entropy(logits, sample.labels).item()


def test_every_plan_s_loss_is_that_of_a_narrowed_run():
    model, graph, samples = small()
    labels = label_samples(
        model, graph, samples, terms_of(graph, "layers"), BUDGETS, tried=2, batch=5
    )
    assert labels.switches == ("layer.0", "layer.1", "layer.2", "layer.3")
    assert len(labels) == 9
    assert sorted(labels.losses) == list(range(6))
    session = session_on(model, graph)
    for number, (_, sample) in enumerate(samples[:2]):
        base = loss_under(model, session, plan_of(graph), sample)
        expected = []
        for plan in all_plans(4):
            off = tuple(np.flatnonzero(~plan).tolist())
            expected.append(loss_under(model, session, plan_of(graph, layers_off=off), sample))
        found = labels.losses[3 * number]
        np.testing.assert_allclose(found, np.array(expected) - base, atol=2e-4)
        alone = found[[0b1110, 0b1101, 0b1011, 0b0111]]
        np.testing.assert_allclose(labels.utilities[3 * number], alone, atol=1e-5)


def test_heads_and_groups_are_measured_one_by_one():
    model, graph, samples = small()
    terms = terms_of(graph, "heads,mlp", mlp_groups=3)
    labels = label_samples(model, graph, samples[:1], terms, (0.7,), batch=4)
    session = session_on(model, graph)
    base = loss_under(model, session, plan_of(graph), samples[0][1])
    for name, found in zip(labels.switches, labels.utilities[0], strict=True):
        kind, layer, index = name.replace("[", ".").rstrip("]").split(".")
        others = {int(layer): tuple(u for u in range(3 if kind == "mlp" else 2) if u != int(index))}
        groups = {"mlp_switches": {int(layer): 3}} if kind == "mlp" else {}
        plan = plan_of(graph, **{kind: others}, **groups)
        loss = loss_under(model, session, plan, samples[0][1])
        assert found == pytest.approx(loss - base, abs=2e-4)


def test_labels_survive_an_interrupt_and_their_audit(tmp_path):
    model, graph, samples = small()
    partial, terms = tmp_path / "partial", terms_of(graph, "layers")

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_samples(
            model, graph, samples, terms, BUDGETS, tried=1, partial=partial, progress=stop
        )
    assert partial.exists()
    with pytest.raises(InputError, match="other options"):
        label_samples(model, graph, samples, terms, (0.5,), tried=1, partial=partial)
    seen = []
    labels = label_samples(
        model, graph, samples, terms, BUDGETS, tried=1, partial=partial,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(2, 3), (3, 3)]
    assert not partial.exists()
    fresh = label_samples(model, graph, samples, terms, BUDGETS, tried=1)
    np.testing.assert_array_equal(labels.utilities, fresh.utilities)
    np.testing.assert_array_equal(labels.plans, fresh.plans)
    assert labels.plans[2::3].all()  # budget 1
    found = audit(labels, graph).summary
    assert found["infeasible"] == found["priced_wrong"] == 0
    assert found["proven"] == 1


def test_a_scheduler_s_plans_are_those_it_makes_prompt_by_prompt():
    model, graph, samples = small()
    torch.manual_seed(0)
    scheduler = Scheduler.of(graph, "adallava-l").eval()
    scheduler.head.weight.data.normal_()
    scheduled = Scheduled(model, graph, scheduler, mask=True)
    terms = terms_of(graph, "adallava-l")
    labels = label_samples(model, graph, samples, terms, BUDGETS, scheduled=scheduled)
    assert labels.plans.sum(1).tolist() == labels.limits.tolist() == [0, 1, 2] * 3
    for index, budget in enumerate(labels.budgets.tolist()):
        _, sample = samples[index // 3]
        prompt = {
            name: value[:, : -sample.answer] if name != "pixel_values" else value
            for name, value in sample.inputs.items()
        }
        with torch.no_grad(), scheduled.using(budget):
            model(**prompt)
            assert scheduled.taken.tolist() == [labels.plans[index].tolist()]
    found = audit(labels, graph).summary
    assert found["infeasible"] == 0
    assert found["utilisation"]["min"] == 1


def _interrupted(*arguments, **options):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_samples(*arguments, progress=stop, **options)


def test_plans_of_two_schedulers_are_not_mixed(tmp_path):
    model, graph, samples = small()
    scheduler = Scheduler.of(graph, "adallava-l").eval()
    scheduled = Scheduled(model, graph, scheduler, mask=True)
    asked = model, graph, samples, terms_of(graph, "adallava-l"), BUDGETS
    options = {"scheduled": scheduled, "partial": tmp_path / "partial"}
    _interrupted(*asked, **options)
    with torch.no_grad():
        scheduler.head.weight[-1].neg_()
    with pytest.raises(InputError, match="another model or scheduler"):
        label_samples(*asked, **options)
    with torch.no_grad():
        scheduler.head.weight[-1].neg_()
    assert len(label_samples(*asked, **options)) == 9


def test_utilities_of_two_models_are_not_mixed(tmp_path):
    stock, graph, samples = small()
    model = copy.deepcopy(stock)
    asked = model, graph, samples, terms_of(graph, "layers"), BUDGETS
    _interrupted(*asked, partial=tmp_path / "partial")
    with torch.no_grad():
        model.model.language_model.layers[2].mlp.down_proj.weight[-1].zero_()
    with pytest.raises(InputError, match="another model"):
        label_samples(*asked, partial=tmp_path / "partial")


def test_bad_arguments_are_refused():
    model, graph, samples = small()
    with pytest.raises(InputError, match="at most 12 layers"):
        label_samples(model, graph, samples, terms_of(graph, "heads"), (0.5,), tried=1)
    for switches in ("tokens,layers", "adallava-h"):
        with pytest.raises(InputError, match="no labels for the switches"):
            label_samples(model, graph, samples, terms_of(graph, switches), (0.5,))
    other = Terms("other", "another fingerprint", "layers", "heuristic", 16, 8)
    with pytest.raises(InputError, match="are for 'other'"):
        label_samples(model, graph, samples, other, (0.5,))


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llava_folder(), tmp_path / "model", ignore=shutil.ignore_patterns("ada*"))
    arguments = ["labels", "--model", "model", "-o", "labels.parquet", "--samples", "2"]
    assert run([*arguments, "--budgets", "0.75,1", "--try-all", "1", "-q"]) == 0
    labels = read_labels(tmp_path / "labels.parquet")
    assert len(labels) == 4
    assert labels.switches == tuple(f"layer.{n}" for n in range(4, 8))
    assert [path.name for path in tmp_path.iterdir() if "labels" in path.name] == ["labels.parquet"]
    for wrong, words in [
        (["--samples", "0"], "Invalid value for '--samples'"),
        (["--budgets", "2"], "must be more than 0 and at most 1"),
        (["--split", "dev"], "'dev' is not one of"),
        (["--switches", "tokens"], "no labels for the switches"),
        (["--prompts", "p.jsonl"], "--prompts needs --images"),
        (["--switches", "heads", "--try-all", "1"], "every plan can be tried for at most 12"),
        (["-o", "labels.csv"], "must be a file with the suffix .parquet"),
    ]:
        capsys.readouterr()
        assert run([*arguments, *wrong]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.startswith("planner: ")
        assert said.count("\n") == 1
