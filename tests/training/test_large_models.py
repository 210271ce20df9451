"""Published sizes take a training step on the meta device: shapes and gradients, no numbers."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from planner.ir.lowering.capture import build_on_meta
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.scheduling import Scheduler
from planner.planning.catalog import find_model
from planner.planning.graph_cache import lowered_graph
from planner.training import memory_estimate, recipes
from planner.training.memory_estimate import step_bytes

CONFIG = Path(memory_estimate.__file__).parent / "configs" / "unified-llava-7b.yaml"


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


def test_the_unified_controller_takes_a_step_with_llava_7b():
    """As it is trained: gates of tokens from the embeddings, of switches from the middle on."""
    source = find_model("llava-7b")
    model = build_on_meta(source.load_config(), LlavaForConditionalGeneration._from_config).train()
    graph = lowered_graph(source)[0]
    scheduler = Scheduler.of(graph, recipes.load_recipe(CONFIG)[1].switches).to("meta")
    layout, text, images = scheduler.layout, 24, 576
    with torch.device("meta"):
        embeds = torch.empty(2, text + images, 4096, dtype=model.dtype)
        labels = torch.empty(2, text + images + 1, dtype=torch.long)
        mask = torch.empty(2, 1, text + images + 1, text + images + 1, dtype=torch.bool)
        image = torch.ones(2, text + images, dtype=torch.bool)
        share = torch.empty(2)
    scores = scheduler.vision(embeds, image, ~image, share)
    assert scores.counts.shape == (2, layout.choices)
    keep = torch.cat([scores.tokens.sigmoid(), torch.ones_like(share)[:, None]], 1)
    token = scheduler.token(share, torch.tensor(layout.size))
    hidden = torch.cat([embeds, token[:, None].to(embeds.dtype)], 1)
    executor = MaskedExecutor(model, graph)
    layers = model.get_decoder().layers
    with ExitStack() as stack:
        stack.enter_context(executor.using(Gates(tokens={0: keep})))

        def gating(rows):
            """Gates by head or group, of the features that a last linear reads."""
            return lambda _, args: (
                args[0]
                * rows.repeat_interleave(args[0].shape[-1] // rows.shape[1], 1)[:, None].to(args[0])
            )

        def decide(module, args, output):
            gates = layout.inner.gates(scheduler(output[:, -1]).sigmoid())
            stack.enter_context(executor.using(Gates(layers=gates.layers)))
            # The executor masks linears by their weights, and these have none.
            for number in gates.heads:
                block = layers[number]
                heads, groups = gating(gates.heads[number]), gating(gates.mlp[number])
                stack.enter_context(block.self_attn.o_proj.register_forward_pre_hook(heads))
                stack.enter_context(block.mlp.down_proj.register_forward_pre_hook(groups))

        layers[layout.first - 1].register_forward_hook(decide)
        logits = model(inputs_embeds=hidden, attention_mask=mask, use_cache=False).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).backward()
    untouched = {name for name, p in scheduler.named_parameters() if p.grad is None}
    # Counts are drawn, and their gradient comes through costs.
    assert untouched == {"vision.count.weight", "vision.count.bias"}
    assert all(p.grad is not None for p in layers.parameters())
    optimiser = torch.optim.AdamW(scheduler.parameters(), lr=1e-3)
    optimiser.step()


def test_a_step_s_memory_follows_from_its_configuration():
    config = recipes.load_recipe(CONFIG, ["model=llava-7b"])[1]
    found = step_bytes(config, 8)
    gibibyte = 2**30
    assert found.total < 60 * gibibyte
    # 7.06 billion weights of four bytes, shared by eight cards.
    assert found.weights == pytest.approx(7.063e9 * 4 / 8, rel=1e-3)
    assert found.moments == 2 * found.gradients < 2 * found.weights
    alone = step_bytes(config.model_copy(update={"fsdp": ""}), 8)
    assert alone.total > 80 * gibibyte
    assert step_bytes(config.model_copy(update={"freeze_model": True}), 8).gradients == 0
    whole = step_bytes(config.model_copy(update={"activation_checkpointing": False}), 8)
    assert whole.kept_activations > 30 * found.kept_activations
