"""A LLaVA joined from a text model and a tower: what it begins as, what is trained and exported."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_llava import write_small_llava
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from planner.cli import execute
from planner.ir.errors import InputError
from planner.loading import load_model
from planner.planning.catalog import find_model, shipped_folder
from planner.training.data import Packer, SceneConversations
from planner.training.data.packing import IGNORE
from planner.training.data.scenes import Scene, SceneObject
from planner.training.joined_llava import JoinedConfig, build_trainer, join
from planner.training.projector_alignment import (
    NOTHING,
    WORDS,
    align_projector,
    patch_targets,
    patch_words,
)
from planner.training.recipes import load_recipe
from planner.training.trainer import RunTrainer, as_read

# What peft asks of models.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CONFIG = "training/configs/smol-llava.yaml"
ENDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_text_model(folder, end="<|im_end|>"):
    """A random Llama of text alone, with tied embeddings, and a byte-level ChatML tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*ENDS, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": end, "pad_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(ENDS) + len(letters),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def parts(tmp_path):
    """(text model, its folder, the small LLaVA's folder)."""
    folder = tmp_path / "text"
    text = write_text_model(folder)
    return text, folder, write_small_llava(tmp_path / "seeing")


def run(parts, tmp_path, **changes):
    """(model that the recipe gives back, folder that it wrote)."""
    _, text, seeing = parts
    places = {"output_dir": "run", "export_dir": "model", "changes_dir": "changes"}
    settings = {"decoder": text, "model": seeing, "max_steps": 4, "batch_size": 2, "save_steps": 2}
    settings |= {key: tmp_path / value for key, value in places.items()} | {"dtype": "float32"}
    settings |= {
        "max_text_tokens": 500,
        "export_half": "false",
        "turns": "[2]",
        "align_steps": 1,
    } | changes
    train, config = load_recipe(CONFIG, [f"{key}={value}" for key, value in settings.items()])
    return train(config), tmp_path / "model"


def trained_for_a_step(parts, folder, **settings):
    """(trainer, what it trains, processor)."""
    _, text, seeing = parts
    settings |= {"description_share": 0.0, "max_steps": 1, "learning_rate": 1e-3}
    places = {"decoder": str(text), "model": str(seeing), "output_dir": str(folder)}
    return build_trainer(JoinedConfig(**places, **settings))


@torch.no_grad()
def test_text_alone_means_what_it_did(parts):
    text, folder, seeing = parts
    llava, processor, _ = load_model(str(seeing))
    model, _ = join(folder, llava, processor, 0)
    ids = torch.randint(3, text.config.vocab_size, (2, 7))
    logits = model(input_ids=ids).logits[..., : text.config.vocab_size]
    torch.testing.assert_close(logits, text(input_ids=ids).logits)
    pixels = torch.rand(1, 3, 56, 56)
    seen = (each.model.vision_tower(pixels).last_hidden_state for each in (model.eval(), llava))
    assert torch.equal(*seen)


class Killed(BaseException):
    """Like a signal: not to be caught on the way."""


def test_a_run_that_was_stopped_goes_on_and_is_a_stock_model(parts, tmp_path, monkeypatch):
    whole, folder = run(parts, tmp_path / "whole")
    original, steps = RunTrainer.training_step, []

    def killing(self, *args):
        steps.append(1)
        if len(steps) == 4:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, "training_step", killing)
        with pytest.raises(Killed):
            run(parts, tmp_path / "stopped")
    again, _ = run(parts, tmp_path / "stopped")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    short, _ = run(parts, tmp_path / "short", max_steps=2)
    moved = {n for n, w in short.state_dict().items() if not torch.equal(w, again.state_dict()[n])}
    assert all("proj" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)
    assert any("down_proj" in name for name in moved)
    loaded, processor, _ = load_model(str(folder))
    batch = Packer(processor, 500)([SceneConversations("val", 1, 0, 2)[0]])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, whole(**batch).logits)
    assert (tmp_path / "whole" / "changes" / "adapter_model.safetensors").stat().st_size < 100_000


def test_changes_are_put_together_again_with_what_they_belong_to(parts, tmp_path, capsys):
    whole, _ = run(parts, tmp_path)
    changes, output = tmp_path / "changes", tmp_path / "rebuilt"
    capsys.readouterr()
    assert execute(["convert", str(changes), "-o", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "joined-llava"
    loaded, processor, _ = load_model(str(output))
    batch = Packer(processor, 500)([SceneConversations("val", 1, 0, 2)[0]])
    with torch.no_grad():
        found, expected = loaded(**batch).logits, whole(**batch).logits
    # Changes and weights are kept in half precision.
    assert (found - expected).norm() < 0.01 * expected.norm()
    before = {n: w for n, w in load_model(str(parts[2]))[0].state_dict().items() if "tower" in n}
    for name, weight in before.items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=1e-3, atol=1e-3)
    # It is new, or it is not written.
    assert execute(["convert", str(changes), "-o", str(output)]) == 2
    assert "is there already" in capsys.readouterr().err


def _without_weights(changes, parts):
    (changes / "adapter_model.safetensors").unlink()


def _of_another_model(changes, parts):
    config = LlamaConfig.from_pretrained(parts[1])
    config.hidden_size, config.num_attention_heads = 16, 2
    LlamaForCausalLM(config).save_pretrained(parts[1])


def _broken(changes, parts):
    (changes / "adapter_model.safetensors").write_bytes(b"1234567890")


def _of_the_future(changes, parts):
    (changes / "joined.json").write_text('{"format": 99}')


def _of_no_seed(changes, parts):
    (changes / "joined.json").write_text('{"format": 1, "decoder": "smollm2", "model": "x"}')


def _without_a_decoder(changes, parts):
    shutil.rmtree(parts[1])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_without_weights, "has no adapter_model.safetensors"),
        (_of_another_model, "do not fit their model"),
        (_broken, "do not fit their model"),
        (_of_the_future, "format"),
        (_of_no_seed, "it says decoder, model, seed"),
        (_without_a_decoder, "is no folder with a text model"),
    ],
)
def test_changes_that_do_not_fit_are_refused_and_nothing_is_written(
    parts, tmp_path, capsys, harm, message
):
    run(parts, tmp_path, max_steps=2)
    harm(tmp_path / "changes", parts)
    capsys.readouterr()
    output = tmp_path / "rebuilt"
    assert execute(["convert", str(tmp_path / "changes"), "-o", str(output)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not output.exists()


def test_options_of_one_kind_of_folder_are_refused_for_another(parts, tmp_path, capsys):
    run(parts, tmp_path, max_steps=2)
    other = ["convert", str(parts[2]), "-o", str(tmp_path / "x"), "--decoder", str(parts[1])]
    assert execute(other) == 2
    assert "--decoder is for changes" in capsys.readouterr().err
    tower = ["convert", str(tmp_path / "changes"), "-o", str(tmp_path / "x")]
    assert execute([*tower, "--vision-tower", str(parts[2])]) == 2
    assert "name the model whose vision tower" in capsys.readouterr().err


def test_loss_is_of_answers(parts, tmp_path):
    _, answering, processor = trained_for_a_step(parts, tmp_path)
    batch = Packer(processor, 500)([SceneConversations("val", 2, 0, 3)[i] for i in range(2)])
    with torch.no_grad():
        expected = answering.model.get_base_model()(**batch).loss
        assert float(answering(**batch).loss) == pytest.approx(float(expected), rel=1e-5)


def test_no_token_sees_an_answer_that_follows_or_another_question_s(parts, tmp_path):
    """Attention that is written out adds masks, and a boolean one would hide nothing."""
    trainer, answering, _ = trained_for_a_step(parts, tmp_path, turns=(3,), max_text_tokens=500)
    batch = trainer.data_collator([SceneConversations("val", 1, 0, 3)[0]])
    batch.pop("ids")
    llava = answering.model.get_base_model()
    assert llava.config.text_config._attn_implementation == "eager"

    def logits(**changes):
        inputs = trainer._prepare_inputs({**batch, **changes})
        with torch.no_grad():
            return llava(**{k: v for k, v in inputs.items() if k != "labels"}).logits[0]

    answers = (batch["labels"][0] != IGNORE).nonzero().flatten()
    starts = [int(a) for a in answers if int(a) - 1 not in answers]
    assert len(starts) == 3
    ids = batch["input_ids"].clone()
    ids[0, starts[1]] += 1
    changed = (logits(input_ids=ids) - logits()).abs().amax(-1) > 1e-6
    assert not changed[: starts[1]].any()
    assert changed[starts[1]]
    assert not changed[starts[2] - 1 :].any()
    llava.set_attn_implementation({"text_config": "sdpa"})
    expected = logits()
    llava.set_attn_implementation({"text_config": "eager"})
    torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)


def test_masks_are_given_as_attention_reads_them(parts):
    llava, _, _ = load_model(str(parts[2]))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    assert as_read(mask, llava) is mask
    llava.set_attn_implementation({"text_config": "eager"})
    assert torch.equal(as_read(mask, nn.ModuleList([llava])) == 0, mask)
    llava.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="a mask of its own, which flash_attention_2 does not"):
        as_read(mask, llava)


def test_other_chat_formats_are_refused(parts, tmp_path):
    _, _, seeing = parts
    write_text_model(tmp_path / "other", end="<|endoftext|>")
    llava, processor, _ = load_model(str(seeing))
    with pytest.raises(InputError, match="does not end turns as ChatML does"):
        join(tmp_path / "other", llava, processor, 0)
    with pytest.raises(InputError, match="is no folder with a text model"):
        join(tmp_path / "none", llava, processor, 0)


def test_the_changes_that_ship_are_of_the_recipe():
    """Their decoder is fetched, so that they are put together elsewhere: names and sizes."""
    folder = shipped_folder("smol-llava")
    assert json.loads((folder / "joined.json").read_text())["decoder"] == "smollm2"
    with safe_open(folder / "adapter_model.safetensors", "pt") as changes:
        shapes = {name: changes.get_slice(name).get_shape() for name in changes.keys()}  # noqa: SIM118
    named = (name.partition(".layers.")[2] for name in shapes if ".layers." in name)
    layers = {int(name.partition(".")[0]) for name in named}
    assert layers == {*range(30)}
    ranks = {min(shape) for name, shape in shapes.items() if "lora" in name}
    assert ranks == {16}
    assert any("multi_modal_projector" in name for name in shapes)


def test_smol_llava_is_the_folder_that_was_put_together_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smol-llava").mkdir()
    with pytest.raises(InputError, match="planner convert smol-llava -o smol-llava, and that"):
        find_model("smol-llava")
    config = shipped_folder("deep-llava") / "config.json"
    (tmp_path / "smol-llava" / "config.json").write_text(config.read_text())
    assert find_model("smol-llava").folder == Path("smol-llava")


def test_what_patches_should_become():
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 4.0], [-1.0, -2.0]])
    words = torch.tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0]]]).float()
    found = patch_targets(words, embeddings)
    expected = [[[3 / 2**0.5, 4 / 2**0.5], [-1, -2]], [[3, 0], [0, 4]]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_every_object_is_named_once_and_a_text_is_spelled():
    seen = [
        SceneObject("small", "red", "cross", 0, 0),
        SceneObject("large", "cyan", "circle", 2, 1),
    ]
    words = patch_words(Scene(tuple(seen), "toy", 1, hard=False, appearance=0), 7)
    told = {
        divmod(patch, 7): {WORDS[i] for i in row.nonzero()[:, 0].tolist()}
        for patch, row in enumerate(words)
    }
    assert told.pop((1, 1)) == {"small", "red", "cross", "top", "left"}
    assert told.pop((5, 3)) == {"large", "cyan", "circle", "bottom", "center"}
    assert [told.pop((3, column)) for column in (2, 3, 4)] == [{"t"}, {"o"}, {"y"}]
    assert len(told) == 44
    assert set(map(frozenset, told.values())) == {frozenset({NOTHING})}


def test_aligning_changes_the_projector_alone_and_brings_it_nearer_to_words(parts):
    _, folder, seeing = parts
    llava, processor, _ = load_model(str(seeing))
    model, made = join(folder, llava, processor, 0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    scenes = SceneConversations("train", 32 * 30, 0)
    told = []
    for steps in (1, 30):
        align_projector(model, made, scenes, steps, told.append)
    far, near = (float(line.split(": ")[1].partition("%")[0]) for line in told)
    assert near < 0.9 * far
    moved = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert moved
    assert all("multi_modal_projector" in name for name in moved)
    others = [replace(scenes[i], scene=None) for i in range(32)]
    with pytest.raises(InputError, match="needs rendered scenes"):
        align_projector(model, made, others, 1)
