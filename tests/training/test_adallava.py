"""AdaLLaVA's training: what a batch is, what the gradient reaches, and runs that stop or split."""

import json
from pathlib import Path

import pytest
import torch
from small_llava import write_small_llava

from planner.ir.errors import InputError, PlannerError
from planner.ir.lowering import lower_model
from planner.loading import load_model
from planner.models.running.kv_cache import cache_argument
from planner.models.scheduling import Scheduled, Scheduler, layout_of, load_scheduler
from planner.planning.budgets import Budget
from planner.training import adallava
from planner.training.adallava import AdaptiveModel, BudgetCollator, build_trainer, last_answer
from planner.training.data import Packer, SceneConversations
from planner.training.data.packing import IGNORE
from planner.training.data.visits import Visit, Visits
from planner.training.estimators import GumbelSequential, parse
from planner.training.recipes import load_recipe
from planner.training.tiny_llava import build_processor
from planner.training.trainer import RunTrainer

CONFIGS = Path(adallava.__file__).parent / "configs"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random small LLaVA with its processor, on disk."""
    return write_small_llava(tmp_path_factory.mktemp("base"))


def settings(base, folder, **changes):
    common = {"max_steps": 4, "batch_size": 4, "save_steps": 2, "logging_steps": 1}
    return adallava.AdaLlavaConfig(
        model=str(base), output_dir=str(folder), **common | {"learning_rate": 1e-3} | changes
    )


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def losses(folder):
    states = sorted(Path(folder).glob("checkpoint-*/trainer_state.json"))
    history = json.loads(states[-1].read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


# -- batches ---------------------------------------------------------------------------------------


def test_the_token_stands_before_the_last_answer():
    labels = torch.full((3, 9), IGNORE)
    labels[0, 2:4] = 5
    labels[0, 6:8] = 5
    labels[1, 3:] = 5
    labels[2, 8] = 5
    assert last_answer(labels).tolist() == [6, 3, 8]


def test_budgets_follow_from_the_visit_alone():
    """They differ between epochs, and between records that share an id."""
    collate = BudgetCollator(lambda conversations: {}, 4, 0, [1, 3])
    scene = SceneConversations("train", 1)[0]
    many = collate([Visit(number, scene) for number in range(200)])
    few = collate([Visit(number, scene) for number in (7, 3)])
    assert many["limits"][[7, 3]].tolist() == few["limits"].tolist()
    assert many["seeds"][[7, 3]].tolist() == few["seeds"].tolist()
    assert len(many["seeds"].unique()) == 200
    # Uniform over 0 to 4: 40 of each expected, with a standard deviation under 6.
    counts = torch.bincount(many["limits"], minlength=5)
    assert len(counts) == 5
    assert (counts - 40).abs().max() < 24


def test_budgets_stay_between_the_two_that_are_asked_for(base, tmp_path):
    def limits(**changes):
        trainer, adaptive, _ = build_trainer(settings(base, tmp_path, **changes))
        visits = [Visit(number, SceneConversations("train", 1)[0]) for number in range(40)]
        return trainer.data_collator(visits)["limits"], adaptive.layout

    found, layout = limits(least_budget=0.6, most_budget=0.8)
    low, high = (layout.limit(Budget.of(share)) for share in (0.6, 0.8))
    assert set(found.tolist()) == set(range(low, high + 1))
    with pytest.raises(InputError, match=r"least_budget=0\.9 and most_budget=0\.8"):
        limits(least_budget=0.9, most_budget=0.8)


def test_steps_hold_pictures_or_text_alone():
    kinds = [1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0]
    visits = [*Visits(kinds, 11, 3, 9, seed=1)]
    assert len(visits) == 27
    epochs = [visits[start : start + 9] for start in (0, 9, 18)]
    for number, epoch in enumerate(epochs):
        assert {visit // 11 for visit in epoch} == {number}
        assert len({visit % 11 for visit in epoch}) == 9
        of = [[kinds[v % 11] for v in epoch[start : start + 3]] for start in (0, 3, 6)]
        # Seven pictures and four texts: two steps of one, one of the other.
        assert sorted(map(sum, of)) == [0, 3, 3]
    assert len({tuple(visit % 11 for visit in epoch) for epoch in epochs}) == 3
    assert visits == [*Visits(kinds, 11, 3, 9, seed=1)]
    assert visits != [*Visits(kinds, 11, 3, 9, seed=2)]
    # What is left of both kinds fills a step; a set smaller than one is met again.
    assert [*Visits([1, 1, 0], 3, 3, 1, 0)] != []
    assert sorted(v % 2 for v in Visits(None, 2, 4, 1, 0)) == [0, 0, 1, 1]


def test_a_second_epoch_has_other_budgets_also_after_a_stop(base, tmp_path, monkeypatch):
    """Four records in steps of four: every step is an epoch."""
    seen = []
    original = BudgetCollator.__call__

    def watched(self, visits):
        batch = original(self, visits)
        seen.append(([v.number for v in visits], batch["limits"].tolist(), batch["seeds"].tolist()))
        return batch

    monkeypatch.setattr(BudgetCollator, "__call__", watched)
    config = settings(base, tmp_path / "whole", scenes=4, max_steps=3, save_steps=1)
    adallava.train(config)
    whole, seen[:] = seen[:3], []
    assert [sorted(number // 4 for number in numbers) for numbers, *_ in whole] == [
        [0] * 4,
        [1] * 4,
        [2] * 4,
    ]
    assert len({seed for *_, seeds in whole for seed in seeds}) == 12
    adallava.train(settings(base, tmp_path / "cut", scenes=4, max_steps=3, save_steps=1))
    (tmp_path / "cut" / "checkpoint-3").rename(tmp_path / "gone")
    seen.clear()
    adallava.train(settings(base, tmp_path / "cut", scenes=4, max_steps=3, save_steps=1))
    assert seen[-1] == whole[2]


# -- sampling --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(base):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    return model, lower_model(model, "small")


def test_units_are_drawn_exactly_and_their_gradient_reaches_what_is_left(loaded):
    layout = layout_of("adallava-h", loaded[1])
    torch.manual_seed(0)
    logits = torch.randn(5, layout.size, requires_grad=True)
    limits = torch.tensor([0, 1, 3, 5, layout.steps])
    gates = GumbelSequential().draw_units(logits, limits, layout.heads, layout.rank)
    assert set(gates.unique().tolist()) <= {0.0, 1.0}
    assert [layout.spent(row.bool()) for row in gates] == limits.tolist()
    worth = torch.randn(layout.size)
    (gates @ worth).sum().backward()
    assert not logits.grad[0].any()
    assert (logits.grad[1:4] != 0).all()


def test_units_that_noise_cannot_change_are_those_of_inference(loaded):
    layout = layout_of("adallava-h", loaded[1])
    torch.manual_seed(1)
    logits, limits = 1e6 * torch.randn(4, layout.size), torch.tensor([1, 2, 4, 7])
    drawn = GumbelSequential().draw_units(logits, limits, layout.heads, layout.rank)
    assert torch.equal(drawn.bool(), layout.decide(logits, limits))


def naive_units(logits, count, unit, tau, noise):
    """AdaLLaVA-H's draws for one sample, logits (layers, 2, heads), one scalar after the other."""
    layers, _, heads = logits.shape
    gates = [
        [[logits.new_zeros(()) for _ in range(heads)] for _ in range(2)] for _ in range(layers)
    ]

    def gumbel(number):
        return [-x.log() for x in torch.empty(number).exponential_(generator=noise)]

    def softmax(values):
        total = sum(value.exp() for value in values.values())
        return {key: value.exp() / total for key, value in values.items()}

    def straight_through(on, share):
        return on - share.detach() + share

    places = [(i, s, h) for i in range(layers) for s in range(2) for h in range(heads)]
    for _ in range(count):
        fresh = dict(zip(places, gumbel(len(places))))
        left = {
            p: (logits[p] + fresh[p]) / tau for p in places if not gates[p[0]][p[1]][p[2]] > 0.5
        }
        shares = softmax(left)
        best = max(left, key=left.get)[0]
        of_layer = [
            straight_through(float(i == best), sum(s for p, s in shares.items() if p[0] == i))
            for i in range(layers)
        ]
        fresh = gumbel(2 * heads)
        for s in range(2):
            inner = {}
            for h in range(heads):
                score = sum(of_layer[i] * logits[i, s, h] for i in range(layers))
                if not gates[best][s][h] > 0.5:
                    inner[h] = (score + fresh[s * heads + h]) / tau
            shares = softmax(inner)
            kept = sorted(inner, key=inner.get)[-unit:]
            for h in inner:
                member = straight_through(float(h in kept), shares[h])
                for i in range(layers):
                    gates[i][s][h] = gates[i][s][h] + of_layer[i] * member
    return torch.stack([torch.stack([torch.stack(site) for site in layer]) for layer in gates])


@pytest.mark.parametrize(
    ("layers", "heads", "unit", "counts"), [(3, 4, 2, [1, 4]), (2, 6, 3, [3, 0])]
)
def test_units_and_their_gradient_are_the_authors(layers, heads, unit, counts):
    torch.manual_seed(2)
    logits = torch.randn(len(counts), layers * 2 * heads, requires_grad=True)
    worth = torch.randn(layers * 2 * heads)
    noise = [torch.Generator().manual_seed(row) for row in range(len(counts))]
    estimator = GumbelSequential(temperature=1.5)
    gates = estimator.draw_units(logits, torch.tensor(counts), heads, unit, noise)
    (found,) = torch.autograd.grad((gates * worth).sum(), logits)
    for row, count in enumerate(counts):
        own = logits[row].detach().clone().requires_grad_()
        naive = naive_units(
            own.view(layers, 2, heads), count, unit, 1.5, torch.Generator().manual_seed(row)
        )
        assert torch.equal(gates[row].detach(), naive.detach().flatten().round())
        expected = torch.zeros_like(own)
        if count:
            (expected,) = torch.autograd.grad((naive.flatten() * worth).sum(), own)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("switches", "estimator"),
    [
        ("adallava-l", "gumbel"),
        ("adallava-l", "gumbel-topk"),
        ("adallava-l", "simple"),
        ("adallava-l", "deterministic"),
        ("adallava-h", "gumbel"),
        ("layers,heads,mlp", "gumbel"),
        ("layers,heads,mlp", "gumbel-topk"),
        ("heads,mlp", "simple"),
        ("heads,mlp", "deterministic"),
    ],
)
def test_the_gradient_reaches_scheduler_and_decoder(base, switches, estimator):
    config = settings(base, "unused", switches=switches, estimator=estimator)
    trainer, adaptive, _ = build_trainer(config)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    batch.pop("ids")
    batch["limits"] = torch.tensor([1, 1, 2, 1]) * adaptive.scheduler.layout.steps // 2
    output = adaptive(**batch)
    output.loss.backward()
    assert adaptive.scheduler.head.weight.grad.any()
    assert adaptive.scheduler.encoder.second.weight.grad.any()
    assert adaptive.model.lm_head.weight.grad.any()
    vision = adaptive.model.get_encoder("image")
    assert all(p.grad is None for p in vision.parameters())


def test_units_take_no_other_estimator(base):
    config = settings(base, "unused", switches="adallava-h", estimator="simple")
    with pytest.raises(InputError, match="its estimator is gumbel"):
        build_trainer(config)


@torch.no_grad()
def test_a_sample_is_trained_as_it_is_asked(loaded, base):
    """The logits that predict the answer: in training, and through the prompt and its cache."""
    model, graph = loaded
    processor = build_processor()
    scheduler = Scheduler.of(graph, "adallava-l").eval()
    scheduler.head.weight.data.normal_()
    adaptive = AdaptiveModel(model, graph, scheduler, parse("gumbel"))
    adaptive._draw = None
    adaptive.scheduled.decide = scheduler.layout.decide
    scene = SceneConversations("train", 5, questions=1, description_share=0)[2]
    batch = BudgetCollator(Packer(processor, 60, 1.0), 2, 0, [1])([Visit(0, scene)])
    batch.pop("ids")
    batch["limits"] = torch.tensor([1])
    trained = adaptive(**batch).logits
    adaptive.scheduled.detach()
    start = int(last_answer(batch["labels"]))
    answer = batch["input_ids"][:, start:]
    with Scheduled(model, graph, scheduler).using(0.75):
        prompt = {"input_ids": batch["input_ids"][:, :start], "pixel_values": batch["pixel_values"]}
        out = model(**prompt, use_cache=True)
        logits = [out.logits[:, -1:]]
        for place in range(answer.shape[1] - 1):
            token = answer[:, place : place + 1]
            cached = {cache_argument(model.forward): out.past_key_values}
            logits.append(model(input_ids=token, **cached).logits)
    asked = torch.cat(logits, 1)
    found = trained[:, start - 1 : -1]
    assert (asked - found).norm() <= 1e-5 * found.norm()


# -- runs ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Like a signal: not to be caught on the way."""


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return weights(adallava.train(settings(base, folder, export_dir=str(folder / "model")))), folder


@pytest.mark.parametrize(("method", "call"), [("training_step", 4), ("_save_rng_state", 2)])
def test_a_killed_run_resumes_bit_exactly(base, tmp_path, monkeypatch, uninterrupted, method, call):
    original, calls = getattr(RunTrainer, method), []

    def killing(self, *args):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(self, *args)

    config = settings(base, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, method, killing)
        with pytest.raises(Killed):
            adallava.train(config)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert (checkpoint / "rng_state.pth").is_file()
    resumed = weights(adallava.train(config))
    expected = uninterrupted[0]
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_model_with_tied_embeddings_resumes_bit_exactly(base, tmp_path, monkeypatch):
    model, processor, _ = load_model(str(base))
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    processor.save_pretrained(tmp_path / "tied")
    expected = weights(adallava.train(settings(tmp_path / "tied", tmp_path / "whole")))
    stopped_at_step_4(monkeypatch, settings(tmp_path / "tied", tmp_path / "run"))
    resumed = adallava.train(settings(tmp_path / "tied", tmp_path / "run"))
    assert resumed.model.lm_head.weight is resumed.model.get_input_embeddings().weight
    assert all(torch.equal(weights(resumed)[name], expected[name]) for name in expected)


def stopped_at_step_4(monkeypatch, config):
    original, calls = RunTrainer.training_step, []

    def killing(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, "training_step", killing)
        with pytest.raises(Killed):
            adallava.train(config)


def test_a_loss_that_is_no_number_names_the_batch(base, tmp_path):
    with pytest.raises(PlannerError, match=r"The loss is nan at step \d+, batch of records train-"):
        adallava.train(settings(base, tmp_path, learning_rate=1e30, max_steps=20))


def test_what_is_exported_loads_and_runs(uninterrupted):
    from transformers import AutoModelForImageTextToText

    trained, folder = uninterrupted
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    graph = lower_model(model, "small")
    scheduler = load_scheduler(folder / "model", graph)
    for name, tensor in scheduler.state_dict().items():
        assert torch.equal(tensor, trained[f"scheduler.{name}"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[f"model.{name}"])


def test_what_is_drawn_is_logged(base, tmp_path):
    """Beside the loss; counted over all samples of the steps between."""
    adallava.train(settings(base, tmp_path, logging_steps=2, switches="layers,heads,mlp"))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logged) == 2
    assert all(0.9 < entry["utilisation"] <= 1 and entry["violations"] == 0 for entry in logged)


def test_a_scheduler_that_passes_budgets_is_logged_as_such(base, tmp_path):
    adallava.train(
        settings(base, tmp_path, estimator="deterministic:weight=0", scenes=40, max_steps=2)
    )
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert sum(entry.get("violations", 0) for entry in state["log_history"]) > 0


def test_what_is_exported_is_asked_as_it_was_trained(base, tmp_path):
    """LLaVA-1.5's prompt and pictures go with the checkpoint."""
    from transformers import AutoProcessor

    asked = {"prompt": "llava-v1", "export_dir": str(tmp_path / "model"), "max_steps": 1}
    adallava.train(settings(base, tmp_path / "run", max_text_tokens=400, **asked))
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}
    asked = processor.apply_chat_template([question], add_generation_prompt=True)
    assert asked.startswith("A chat between a curious user")
    assert asked.endswith("USER: <image>\nWhy? ASSISTANT:")
    assert processor.image_processor.do_pad


# -- configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_load(path):
    load_recipe(path, ["max_steps=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: cake\n", "recipe 'cake' is none of"),
        ("model: x\n", "recipe 'None' is none of"),
        ("recipe: adallava\noutput_dir: x\nlr: 1\n", 'unknown key "lr"'),
        ("recipe: adallava\n", '"output_dir"'),
        ("recipe: [", "truncated or not YAML"),
        (None, "there is no configuration"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
