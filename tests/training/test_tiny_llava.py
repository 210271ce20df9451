import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from planner.ir.errors import InputError, PlannerError
from planner.training import tiny_llava
from planner.training.data import SceneQuestions
from planner.training.recipes import load_recipe
from planner.training.trainer import MuonAdamW, RunTrainer, last_checkpoint

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


def test_muon_resumes_bit_exactly_and_trains_the_matrices_of_layers(tmp_path, monkeypatch):
    whole = weights(train(tmp_path / "whole", muon=True))
    original, calls = RunTrainer.training_step, []

    def killing(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, "training_step", killing)
        with pytest.raises(Killed):
            train(tmp_path / "killed", muon=True)
    resumed = weights(train(tmp_path / "killed", muon=True))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())

    named = [("a.layers.0.q.weight", torch.nn.Parameter(torch.eye(3))),
             ("lm_head.weight", torch.nn.Parameter(torch.eye(3)))]  # fmt: skip
    optimizer = MuonAdamW(named, lr=0.1, weight_decay=0.0, betas=(0.9, 0.98))
    gradient = torch.tensor([[5.0, 0, 0], [0, 1.0, 0], [0, 0, 0.2]])
    for _, parameter in named:
        parameter.grad = gradient.clone()
    optimizer.step()
    # Muon moves equally far along all of a gradient's directions, AdamW along all its elements.
    moved = (torch.eye(3) - named[0][1]).diagonal()
    assert moved.max() < 1.6 * moved.min()
    torch.testing.assert_close((torch.eye(3) - named[1][1]).diagonal(), torch.full((3,), 0.1))


def test_a_model_grows_without_another_answer_and_then_learns(tmp_path):
    config = tiny_llava.TinyLlavaConfig(**{**SMALL, "output_dir": str(tmp_path)})
    processor = tiny_llava.build_processor()
    model = tiny_llava.build_model(config, processor)
    grown = tiny_llava.deepened(model, config.model_copy(update={"layers": 6}), processor)
    assert len(grown.model.language_model.layers) == 6
    conversations = [tiny_llava.SceneConversations("train", 4)[i] for i in range(4)]
    batch = tiny_llava.SceneCollator(tiny_llava.Packer(processor, 60), 8, False)(conversations)
    batch.pop("ids")
    assert torch.equal(grown(**batch).loss, model(**batch).loss)
    grown(**batch).loss.backward()
    layer = grown.model.language_model.layers[1]
    assert layer.self_attn.o_proj.weight.grad.abs().max() > 0
    assert layer.mlp.down_proj.weight.grad.abs().max() > 0
    with pytest.raises(InputError, match="2 layers grow to a multiple of them, not to 3"):
        tiny_llava.deepened(model, config.model_copy(update={"layers": 3}), processor)


def test_later_stages_change_what_they_name_and_see_other_scenes(tmp_path):
    later = {"spatial": {"family_weights": {"spatial": 1}}, "deep": {"layers": 4, "max_steps": 2}}
    values = {**SMALL, "later_stages": later, "output_dir": str(tmp_path / "run")}
    config = tiny_llava.TinyLlavaConfig(**values)
    found = tiny_llava.stages(config)
    assert list(found) == ["tower", "joint", "spatial", "deep"]
    assert found["deep"].family_weights == {"spatial": 1}
    assert [found[s].layers for s in ("spatial", "deep")] == [2, 4]
    assert len({stage.data_seed for stage in found.values()}) == 4
    model = tiny_llava.train(config)
    assert model.config.text_config.num_hidden_layers == 4
    again = weights(tiny_llava.train(config))
    assert all(torch.equal(again[name], value) for name, value in weights(model).items())
    with pytest.raises(InputError, match="2 layers grow to a multiple of them, not to 3"):
        tiny_llava.stages(config.model_copy(update={"later_stages": {"deep": {"layers": 3}}}))
    with pytest.raises(InputError, match='stage "deep": unknown key "layer"; did you mean'):
        tiny_llava.stages(config.model_copy(update={"later_stages": {"deep": {"layer": 4}}}))


def test_the_deep_configuration_loads():
    _, config = load_recipe(CONFIG.with_name("deep-llava.yaml"))
    assert list(tiny_llava.stages(config))[-1] == "deep"
    assert tiny_llava.stages(config)["deep"].layers == 16
