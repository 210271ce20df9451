"""Training of Dynamic-LLaVA's predictors: the loss against a loop, gradients, runs and exports."""

import json
from pathlib import Path

import pytest
import torch
from small_llava import write_small_llava

from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.loading import load_model
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.tokens.predictors import Predictors, load_predictors
from planner.planning.selectors import PredictorSettings, parse
from planner.training import sparsification
from planner.training.data.packing import IGNORE
from planner.training.recipes import load_recipe
from planner.training.sparsification import DynamicLlavaConfig, SparseModel, build_trainer, train

CONFIGS = Path(sparsification.__file__).parent / "configs"
SMALL = {"inner_width": 8, "output_text_len_for_training": 20, "mask_loss_weight": 7.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_llava(tmp_path_factory.mktemp("base"))


def settings(base, folder, **changes):
    common = {"max_steps": 4, "batch_size": 3, "save_steps": 2, "logging_steps": 1, "turns": [1]}
    common |= {"description_share": 0.6, "predictors": SMALL}
    return DynamicLlavaConfig(model=str(base), output_dir=str(folder), **common | changes)


@pytest.fixture(scope="module")
def prepared(base, tmp_path_factory):
    """(trainer, what it trains, a batch with long and short answers)."""
    trainer, sparse, _ = build_trainer(settings(base, tmp_path_factory.mktemp("run"), batch_size=8))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    batch.pop("ids")
    return trainer, sparse, batch


def answers(batch):
    """Where the answers are, by a loop over the labels."""
    for row in batch["labels"]:
        places = [n for n, label in enumerate(row.tolist()) if label != IGNORE]
        yield places if len(places) >= SMALL["output_text_len_for_training"] else []


def test_the_loss_is_that_of_equations_7_and_10(prepared):
    _, sparse, batch = prepared
    torch.manual_seed(0)
    drawn = []
    draw = sparse._drawn
    sparse._drawn = lambda logits: drawn.append(draw(logits)) or drawn[-1]
    try:
        loss = sparse(**batch).loss
    finally:
        del sparse._drawn
    sparse.detach()
    images, outputs = (samples.detach() for samples in drawn)
    gates, penalties = torch.ones(batch["labels"].shape), []
    token = sparse.model.config.image_token_id
    for row, long in enumerate(answers(batch)):
        pictures = [n for n, i in enumerate(batch["input_ids"][row].tolist()) if i == token]
        gates[row, pictures] = images[row, : len(pictures)]
        gates[row, long] = outputs[row, long]
        penalties.append(float((0.2 - gates[row, pictures].mean()) ** 2))
        penalties[-1] += float((0.5 - gates[row, long].mean()) ** 2) if long else 0
    assert any(answers(batch))
    assert not all(answers(batch))
    assert 0 < images.mean() < 1, "all or nothing was kept"
    graph = lower_model(sparse.model, "small")
    with MaskedExecutor(sparse.model, graph).using(Gates(tokens={2: gates})):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = sparse.model(**inputs, use_cache=False).logits
    shifted, wanted = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(shifted, wanted, ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected + 7.0 * sum(penalties) / 8)


def test_gradients_reach_predictors_and_model(base):
    model, _, _ = load_model(str(base))
    graph = lower_model(model, "small")
    sparse = SparseModel(model, graph, Predictors(32, PredictorSettings(**SMALL)))
    ids = torch.full((2, 49 + 40), 7)
    ids[:, 1:50] = model.config.image_token_id
    labels = ids.clone()
    labels[:, :60] = IGNORE
    pixels = torch.randn(2, 3, 56, 56)
    loss = sparse(labels, input_ids=ids, pixel_values=pixels).loss
    loss.backward()
    for name, parameter in sparse.predictors.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert sparse.predictors.image.down_mlp[1].weight.grad.any()
    assert sparse.predictors.output.output_mlp[1].weight.grad.any()
    assert model.lm_head.weight.grad.any()
    first = sparse.predictors.output.output_mlp[1].weight.grad.clone()
    # Layers that keep no activations are run again in the backward pass, under the same masks.
    model.activation_checkpointing_enable()
    model.train()
    sparse.zero_grad()
    torch.manual_seed(1)
    sparse(labels, input_ids=ids, pixel_values=pixels).loss.backward()
    again = sparse.predictors.output.output_mlp[1].weight.grad.clone()
    model.activation_checkpointing_disable()
    sparse.zero_grad()
    torch.manual_seed(1)
    sparse(labels, input_ids=ids, pixel_values=pixels).loss.backward()
    torch.testing.assert_close(again, sparse.predictors.output.output_mlp[1].weight.grad)
    assert first.shape == again.shape
    sparse.detach()


def test_the_temperature_falls_and_rates_are_logged(base, tmp_path):
    config = settings(base, tmp_path / "run")
    trainer, sparse, _ = build_trainer(config)
    trainer.run()
    assert sparse.temperature == pytest.approx(0.1 ** (3 / 4))
    state = json.loads((tmp_path / "run/checkpoint-4/trainer_state.json").read_text())
    assert all(0 < entry["image_kept"] < 1 for entry in state["log_history"] if "loss" in entry)
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {5e-6, 2e-4}
    sparse.detach()


@pytest.mark.parametrize("freeze", [False, True])
def test_what_was_trained_runs_by_planner(base, tmp_path, freeze):
    changes = {"export_dir": str(tmp_path / "model"), "max_steps": 2, "freeze_model": freeze}
    sparse = train(settings(base, tmp_path / "run", **changes))
    loaded = load_predictors(tmp_path / "model", 32)
    torch.testing.assert_close(loaded.state_dict(), sparse.predictors.state_dict())
    assert parse(f"dynamic-llava:{tmp_path / 'model'}").counts(49) == (9,)
    assert (tmp_path / "model/model.safetensors").exists() is not freeze


@pytest.mark.parametrize("name", ["dynamic-llava", "dynamic-llava-7b"])
def test_shipped_configurations_are_read(name):
    _, config = load_recipe(CONFIGS / f"{name}.yaml")
    settings = PredictorSettings.of(config.predictors, name)
    assert (settings.vision_keep_rate, settings.output_text_keep_rate) == (0.2, 0.5)
    if name.endswith("7b"):
        assert (config.learning_rate, config.predictor_learning_rate) == (5e-6, 2e-4)
        assert settings == PredictorSettings()


def test_bad_settings_say_what_is_wrong(base, tmp_path):
    for given, match in (({"keep": 1}, "no setting 'keep'"), ({"sparse_layer": 9}, "has 4 layers")):
        with pytest.raises(InputError, match=match):
            build_trainer(settings(base, tmp_path, predictors=given))
