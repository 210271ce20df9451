"""A small random model of Mipha-3B's shape, Phi with SigLIP, from the command line to answers."""

import json

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from planner.cli import execute
from planner.planning.catalog import find_model
from planner.training.tiny_llava import build_processor


@pytest.fixture(scope="module")
def mipha(tmp_path_factory):
    """Folder of the model, and of a picture beside it."""
    folder = tmp_path_factory.mktemp("mipha")
    config, stock = find_model("mipha-3b").load_config(), build_processor()
    text = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 160}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "eos_token_id": 3}
    vision = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96, "image_size": 56}
    vision |= {"num_attention_heads": 4}
    for part, sizes in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in sizes.items():
            setattr(part, name, value)
    config.image_token_index, config.image_seq_length = stock.image_token_id, 16
    config.dtype = "float32"
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 56, "width": 56}),
        stock.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        image_token=stock.image_token,
        chat_template=stock.chat_template,
    ).save_pretrained(folder)
    Image.effect_noise((90, 60), 80).convert("RGB").save(folder / "noise.png")
    return folder


def ran(mipha, capsys, *arguments):
    capsys.readouterr()
    asked = ["-p", "What?", "-i", str(mipha / "noise.png"), "--new-tokens", "3", "--json"]
    status = execute(["run", "--model", str(mipha), *arguments, *asked])
    out, err = capsys.readouterr()
    return (json.loads(out) if status == 0 else err), status


def test_it_is_compiled_and_runs_whole(mipha, capsys, tmp_path):
    compiled = ["compile", "--model", str(mipha), "--budget", "0.6", "-o", str(tmp_path)]
    assert execute(compiled) == 0
    document, status = ran(mipha, capsys, "--plan", str(tmp_path / "plan.yaml"))
    assert status == 0
    assert document["tokens"] == 3
    assert {"heads in layers", "MLP groups in layers"} <= document["skipped"].keys()
    dense, _ = ran(mipha, capsys, "--budget", "1")
    assert dense["kv_bytes"] > document["kv_bytes"]


@pytest.mark.parametrize(
    ("selector", "left"),
    [("visionzip:dominant=5,contextual=2", 7), ("fastervlm:keep=4", 4), ("vispruner:keep=6", 6)],
)
def test_selectors_rank_patches_without_a_cls_token(mipha, capsys, selector, left):
    document, status = ran(mipha, capsys, "--tokens", selector, "--budget", "1")
    assert status == 0
    assert document["image_tokens"] == [{"layer": 0, "of": 16, "kept": left}]


@pytest.mark.parametrize("selector", ["prumerge+:ratio=0.25", "hired"])
def test_selectors_that_were_published_with_a_cls_token_say_so(mipha, capsys, selector):
    error, status = ran(mipha, capsys, "--tokens", selector, "--budget", "1")
    assert status == 2
    assert "take visionzip, fastervlm or vispruner" in error
