"""A LLaVA with fewer image tokens, trained by the recipe, is a folder like any other."""

import pytest
import torch
from PIL import Image
from small_llava import write_small_llava

from planner.ir.errors import InputError
from planner.loading import load_model, prompt_inputs
from planner.training.recipes import load_recipe

CONFIG = "training/configs/voco.yaml"


def trained(tmp_path, *settings):
    """(model and processor that were exported, weights before) of a run of two steps."""
    base = write_small_llava(tmp_path / "base", vision_layers=4)
    places = [f"output_dir={tmp_path / 'run'}", f"export_dir={tmp_path / 'model'}"]
    few = ["max_steps=2", "batch_size=2", "save_steps=2", f"model={base}", "voco_tokens=0"]
    train, config = load_recipe(CONFIG, [*few, *places, *settings])
    train(config)
    before, *_ = load_model(str(base))
    model, processor, _ = load_model(str(tmp_path / "model"))
    return model, processor, before


def decoder_moved(model, before):
    pairs = zip(model.get_decoder().parameters(), before.get_decoder().parameters(), strict=True)
    return sum(not torch.equal(one, other) for one, other in pairs)


def test_another_projector_is_trained_and_exported(tmp_path):
    model, processor, before = trained(tmp_path, "projector=c-abstractor:3")
    assert decoder_moved(model, before)
    asked = prompt_inputs(model, processor, "What?", Image.new("RGB", (56, 56)))
    assert int((asked["input_ids"] == model.config.image_token_index).sum()) == 9
    assert model(**asked).logits.isfinite().all()


@pytest.mark.parametrize(
    "selector", ["prumerge+:ratio=0.125", "fastv:k=2,r=0.5", "ivtp:group=1,k=2/3"]
)
def test_a_selector_drops_tokens_while_the_model_learns(tmp_path, selector):
    with_all = trained(tmp_path / "all", "tokens=fastv:k=2,r=0")[0]
    model, _, before = trained(tmp_path / "some", f"tokens={selector}")
    assert decoder_moved(model, before)
    # Of equal seeds and pictures: what was dropped taught nothing.
    assert decoder_moved(model, with_all)


@pytest.mark.parametrize("settings", [(), ("voco_tokens=2", "projector=ldp-v2:3")])
def test_one_thing_is_changed(tmp_path, settings):
    with pytest.raises(InputError, match="one of voco_tokens, projector and tokens"):
        trained(tmp_path, *settings)
