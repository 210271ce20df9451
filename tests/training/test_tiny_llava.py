import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from planner.ir.errors import InputError, PlannerError
from planner.training import tiny_llava
from planner.training.data import SceneQuestions
from planner.training.recipes import load_recipe
from planner.training.trainer import RunTrainer, last_checkpoint

CONFIG = Path(tiny_llava.__file__).parent / "configs" / "tiny-llava.yaml"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 2,
    "heads": 2,
    "vision_hidden_size": 32,
    "vision_intermediate_size": 64,
    "vision_layers": 2,
    "vision_heads": 2,
    "batch_size": 4,
    "tower_steps": 2,
    "max_steps": 4,
    "decay_steps": 1,
    "warmup_steps": 1,
    "save_steps": 2,
    "logging_steps": 1,
}


def train(folder, **changes):
    values = {**SMALL, "output_dir": str(folder), **changes}
    return tiny_llava.train(tiny_llava.TinyLlavaConfig(**values))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return weights(train(folder))


class Killed(BaseException):
    """Like a signal: not to be caught on the way."""


@pytest.mark.parametrize(
    ("method", "call"),
    [("training_step", 2), ("training_step", 6), ("_save_rng_state", 3)],
)
def test_a_killed_run_resumes_bit_exactly(tmp_path, monkeypatch, uninterrupted, method, call):
    """Killed at a step or inside a save, in either stage; `call` counts through both."""
    original, calls = getattr(RunTrainer, method), []

    def killing(self, *args):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, method, killing)
        with pytest.raises(Killed):
            train(tmp_path)
    for checkpoint in tmp_path.glob("*/checkpoint-*"):
        assert (checkpoint / "trainer_state.json").is_file()
        assert (checkpoint / "rng_state.pth").is_file()
    resumed = weights(train(tmp_path))
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    assert not list(tmp_path.glob("*/incomplete/*"))


def test_training_lowers_the_loss(tmp_path):
    train(tmp_path, max_steps=16, save_steps=16)
    state = json.loads(
        (Path(last_checkpoint(tmp_path / "joint")) / "trainer_state.json").read_text()
    )
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_seeds_differ(tmp_path, uninterrupted):
    other = weights(train(tmp_path, seed=1))
    assert any(not torch.equal(other[name], uninterrupted[name]) for name in uninterrupted)


def test_a_loss_that_is_no_number_names_the_batch(tmp_path, monkeypatch):
    forward = tiny_llava.TinyLlavaForTraining.forward
    steps = []

    def overflowing(self, *args, **kwargs):
        steps.append(1)
        output = forward(self, *args, **kwargs)
        output.loss = output.loss * (float("nan") if len(steps) == 2 else 1)
        return output

    monkeypatch.setattr(tiny_llava.TinyLlavaForTraining, "forward", overflowing)
    with pytest.raises(
        PlannerError, match=r"loss is nan at step 2, batch of records train-\d+-\d+"
    ):
        train(tmp_path)


def test_the_shipped_configuration_loads_with_overrides():
    _, config = load_recipe(CONFIG, ["learning_rate=1e-5", "seed=3"])
    assert (config.learning_rate, config.seed) == (1e-5, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerning_rate=1", r'unknown key "lerning_rate"; did you mean "learning_rate"\?'),
        ("zzz=1", r'unknown key "zzz"; known: .*max_steps'),
        ("max_steps=many", r'"max_steps": .*found \'many\''),
        ("max_steps", r'should be "--set key=value"'),
        ("max_steps=[", "the value of max_steps is truncated or not YAML"),
    ],
)
def test_a_bad_key_or_value_is_one_sentence(override, message):
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(CONFIG, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "truncated or not YAML"),
        ("- 1", "expected keys and values"),
        (None, "there is no configuration"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_patches_are_labelled_with_what_their_cell_shows():
    for i in range(30):
        scene = SceneQuestions("train", 30)[i].scene
        labels = tiny_llava.patch_concepts(scene, patch_size=8).reshape(7, 7, -1)
        for row in range(3):
            for column in range(3):
                shown = set(scene.text) if scene.text and row == scene.text_row else set()
                for o in scene.objects:
                    if (o.row, o.column) == (row, column):
                        shown = {o.size, o.color, o.shape}
                patch = labels[3 * row, 3 * column]  # corners and middles lie inside their cells
                named = {tiny_llava.CONCEPTS[j] for j in patch.nonzero().flatten()}
                assert named == shown


def test_an_exported_folder_is_what_stock_classes_load(tmp_path):
    trained = train(tmp_path / "run", export_dir=str(tmp_path / "model"))
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.float32
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    sample = SceneQuestions("test", 1)[0]
    ours = tiny_llava.build_processor()(images=sample.image, text="<image>\nwhy?")
    theirs = processor(images=sample.image, text="<image>\nwhy?")
    assert theirs["input_ids"] == ours["input_ids"]
    assert (theirs["pixel_values"][0] == ours["pixel_values"][0]).all()
