"""Published sizes take a training step on the meta device: shapes and gradients, no numbers."""

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from planner.ir.lowering.capture import build_on_meta
from planner.planning.catalog import find_model


@pytest.mark.parametrize("name", ["llava-7b", "llava-13b"])
def test_llava_takes_a_step_with_its_vision_tower_frozen(name):
    config = find_model(name).load_config()
    model = build_on_meta(config, LlavaForConditionalGeneration._from_config).train()
    model.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5)
    with torch.device("meta"):
        pixels = torch.empty(2, 3, 336, 336, dtype=model.dtype)
        words = torch.empty(2, 8, dtype=torch.long)
        labels = torch.empty(2, 576 + 16, dtype=torch.long)
        # Whether a smaller one, or none, pads or packs is a question of numbers.
        mask = torch.empty(2, 1, 576 + 16, 576 + 16, dtype=torch.bool)
    # Which places are an image's is one too, so features are put there by hand.
    image = torch.stack([*model.get_image_features(pixels).pooler_output])
    text = model.get_input_embeddings()(words)
    embeds = torch.cat([text, image.to(text.dtype), text], 1)
    logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).backward()
    assert all(parameter.grad is not None for parameter in trained)
    optimiser.step()
    # Two moments a weight.
    moments = sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in optimiser.state.values())
    assert moments == 2 * sum(parameter.numel() for parameter in trained)
    assert moments > 2 * {"llava-7b": 6.7e9, "llava-13b": 13e9}[name]
