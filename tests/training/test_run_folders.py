"""Folders of training runs: other settings are not gone on with, exports are whole, files stay."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_llava import write_small_llava

from planner.cli import execute
from planner.ir.errors import InputError
from planner.training import adallava, run_folders
from planner.training.config import CONFIGS
from planner.training.recipes import RECIPES, load_recipe
from planner.training.run_folders import ASIDE, INPUTS, MARK, SETTINGS, begun, exporting

OF_RECIPE = {"adallava": "adallava-l", "fine-tuning": "voco", "joined-llava": "smol-llava"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_llava(tmp_path_factory.mktemp("base"))


def config_of(base, folder, **changes):
    common = {"max_steps": 2, "batch_size": 2, "save_steps": 1, "learning_rate": 1e-3}
    places = {"output_dir": str(folder / "run"), "export_dir": str(folder / "model")}
    return adallava.AdaLlavaConfig(**{"model": str(base), **places, **common, **changes})


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    adallava.train(config_of(base, folder))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A finished run of one's own."""
    shutil.copytree(finished, tmp_path / "own")
    return tmp_path / "own"


def begin(config):
    with begun(config):
        pass


def contents(folder):
    """By path inside."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("half_done", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"learning_rate=0\.001, not 0\.5"),
        ({"max_steps": 3}, "max_steps=2, not 3"),
        ({"max_steps": 1}, "max_steps=2, not 1"),
        ({"seed": 7}, "seed=0, not 7"),
        ({"turns": [2]}, r"turns=\[1\], not \[2\]"),
        ({"model": "tiny-llava"}, "another model than 'tiny-llava' is now"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_alone(base, run, changes, message, half_done):
    if half_done:
        shutil.rmtree(run / "run/checkpoint-2")
    before = contents(run)
    with pytest.raises(InputError, match=message) as caught:
        adallava.train(config_of(base, run, **changes))
    assert "name another output_dir" in str(caught.value)
    assert contents(run) == before


def test_the_command_refuses_other_settings(base, run, capsys):
    settings = config_of(base, run).model_dump(mode="json", exclude_none=True)
    sets = [
        word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")
    ]
    asked = ["train", str(CONFIGS / "adallava-l.yaml"), *sets]
    assert execute(asked) == 0
    capsys.readouterr()
    assert execute([*asked, "--set", "seed=7"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_not_learned_may_change(base, run, tmp_path):
    changes = {"save_steps": 7, "logging_steps": 3, "export_half": True, "dataloader_workers": 1}
    moved = run.rename(tmp_path / "elsewhere")
    shutil.copytree(base, tmp_path / "base")
    adallava.train(config_of(tmp_path / "base", moved, **changes))


def test_another_model_under_the_same_name_is_told(base, run, tmp_path):
    own = shutil.copytree(base, tmp_path / "base")
    config = config_of(own, run)
    begin(config)
    weights = load_file(own / "model.safetensors")
    next(iter(weights.values()))[-1] += 1
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"another model than '.*' is now"):
        begin(config)


def test_runs_of_before_go_on(base, run):
    (run / "run" / SETTINGS).unlink()
    shutil.rmtree(run / "run/checkpoint-2")
    adallava.train(config_of(base, run))
    assert (run / "run/checkpoint-2").is_dir()
    assert not (run / "run" / SETTINGS).exists()


def test_settings_that_came_later_had_their_defaults(base, run, monkeypatch):
    class Later(adallava.AdaLlavaConfig):
        new: int = 3

    values = config_of(base, run).model_dump()
    begin(Later(**values))
    with pytest.raises(InputError, match="new=3, not 4"):
        begin(Later(**values, new=4))


def test_a_run_without_a_checkpoint_may_be_begun_anew(base, tmp_path):
    begin(config_of(base, tmp_path))
    assert not list(tmp_path.iterdir())
    with begun(config_of(base, tmp_path, seed=7)):
        (tmp_path / "run" / "labels" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(InputError, match="seed=7, not 0"):
        begin(config_of(base, tmp_path))


def test_a_run_that_is_refused_later_leaves_nothing(base, tmp_path):
    places = {"output_dir": str(tmp_path / "a/run"), "export_dir": str(tmp_path / "b/model")}
    with pytest.raises(InputError, match="unknown switches"):
        adallava.train(config_of(base, tmp_path, switches="none", **places))
    assert not list(tmp_path.iterdir())


def test_names_are_those_of_settings():
    known = {name for schema, _ in RECIPES.values() for name in schema.model_fields}
    assert known > ASIDE | INPUTS


# -- exports ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Like a signal: not to be caught on the way."""


def test_an_export_that_is_cut_short_leaves_the_one_of_before(base, run, monkeypatch):
    def kill(*_):
        assert contents(run / "model") == before
        raise Killed

    before = contents(run / "model")
    config = config_of(base, run, output_dir=str(run / "other"), seed=5)
    with monkeypatch.context() as patched:
        patched.setattr(adallava, "save_scheduler", kill)
        with pytest.raises(Killed):
            adallava.train(config)
    assert contents(run / "model") == before
    adallava.train(config)
    after = contents(run / "model")
    assert after.keys() == before.keys()
    for name in ("model.safetensors", "scheduler.safetensors", "scheduler.json"):
        assert after[name] != before[name]


def test_an_earlier_export_gives_way_with_all_of_its_files(base, run):
    config = config_of(base, run)
    with exporting(run / "model", config) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "one").write_text("1")
    assert set(contents(run / "model")) == {"sub/one", MARK}
    begin(config)


@pytest.mark.parametrize("name", ["mine", "sub/mine"])
def test_files_of_others_stay(base, run, name):
    (run / "model" / name).parent.mkdir(exist_ok=True)
    (run / "model" / name).write_text("x")
    with pytest.raises(InputError, match=f"did not write, such as {name}: name a new folder"):
        adallava.train(config_of(base, run, output_dir=str(run / "other")))
    assert not (run / "other").exists()
    assert (run / "model" / name).read_text() == "x"


def test_a_folder_that_training_did_not_write_stays(base, tmp_path):
    before = contents(base)
    with pytest.raises(InputError, match="not empty, and no export of planner train"):
        adallava.train(config_of(base, tmp_path, export_dir=str(base)))
    assert contents(base) == before


def test_files_that_came_during_training_stay(base, tmp_path, monkeypatch):
    def add(*_):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine").write_text("x")

    monkeypatch.setattr(adallava.RunTrainer, "run", add)
    with pytest.raises(InputError, match="no export of planner train"):
        adallava.train(config_of(base, tmp_path))
    assert contents(tmp_path / "model") == {"mine": b"x"}


# -- places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("key", ["output_dir", "export_dir", "changes_dir"])
@pytest.mark.parametrize("place", ["file", "file/inside", "/proc/nothing"])
def test_folders_are_checked_before_anything_is_loaded(tmp_path, monkeypatch, recipe, key, place):
    if key == "changes_dir" and recipe != "joined-llava":
        return
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    settings = ["output_dir=run", "export_dir=model", f"{key}={place}"]
    if recipe != "tiny-llava":
        settings.append("model=nowhere")
    train, config = load_recipe(CONFIGS / f"{OF_RECIPE.get(recipe, recipe)}.yaml", settings)
    with pytest.raises(InputError, match=f"cannot write to '{place}'"):
        train(config)
    assert Path("file").read_text() == "x"


@pytest.mark.parametrize("folder", ["run", ".", "run/../run"])
def test_an_export_is_not_written_over_its_run(base, tmp_path, folder):
    with pytest.raises(InputError, match="would be written over"):
        begin(config_of(base, tmp_path, export_dir=str(tmp_path / folder)))
    begin(config_of(base, tmp_path, export_dir=str(tmp_path / "run" / "model")))


@pytest.mark.parametrize("inside", ["", "changes"])
def test_two_folders_are_not_written_over_each_other(tmp_path, inside):
    settings = [f"output_dir={tmp_path / 'run'}", f"export_dir={tmp_path / 'model' / inside}"]
    settings.append(f"changes_dir={tmp_path / 'model'}")
    _, config = load_recipe(CONFIGS / "smol-llava.yaml", settings)
    with pytest.raises(InputError, match="name a folder for each"):
        begin(config)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"format": 2}', '{"format": 1, "settings": 3}'])
def test_broken_records_are_one_sentence(base, run, text):
    for broken in (run / "run" / SETTINGS, run / "model" / MARK):
        whole = broken.read_text()
        broken.write_text(text)
        with pytest.raises(InputError):
            begin(config_of(base, run))
        broken.write_text(whole)


def test_contents_of_files_and_folders_count_and_not_their_names(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    told = run_folders.contents_told
    assert told(str(one)) == told(str(other)) != told(str(tmp_path / "none"))
    (other / "README.md").write_text("words")
    assert told(str(one)) == told(str(other))
    (other / "model.bin").write_bytes(b"1")
    assert told(str(one)) != told(str(other))
    (one / "a.parquet").write_bytes(b"1")
    (other / "b.parquet").write_bytes(b"1")
    assert told(str(one / "a.parquet")) == told(str(other / "b.parquet"))
    assert told("tiny-llava") == "tiny-llava"
    assert told(None) is None
