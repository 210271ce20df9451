"""Projectors: their published sizes; on a small LLaVA they run, learn, are lowered and planned."""

import json

import pytest
import torch
from families import FAMILIES, randomise
from PIL import Image
from plans import plan_of
from small_llava import write_small_llava
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

import planner
from planner.cli import execute
from planner.ir.cost import Workload
from planner.ir.cost.price import operator_flops
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.loading import load_model, prompt_inputs
from planner.models.export import export, load
from planner.models.projectors import (
    ProjectedLlavaConfig,
    ProjectedLlavaForConditionalGeneration,
    fitted_processor,
    projected_config,
    with_projector,
)
from planner.models.running.skipping import obeying
from planner.planning.catalog import find_model

# Of LLaVA-1.5-7B: projector -> tokens, parameters.
PUBLISHED = {
    "token-packer:2": (144, 36_722_688),
    "token-packer:3": (64, 36_722_688),
    "token-packer:4": (36, 36_722_688),
    "c-abstractor": (144, 37_398_016),
    "resampler:64": (64, 106_142_720),
    "qwen-resampler": (256, 89_169_920),
    "pixel-shuffle": (144, 33_570_816),
    "ldp-v2": (144, 21_020_672),
}
# On a grid of 6: projector -> tokens.
SMALL = {
    "token-packer:2": 9,
    "token-packer:3": 4,
    "c-abstractor:3": 9,
    "resampler:5": 5,
    "qwen-resampler:4": 16,
    "pixel-shuffle:2": 9,
    "ldp-v2:3": 9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    config = projected_config(find_model("llava-7b").load_config(), name)
    with torch.device("meta"):
        config.text_config.num_hidden_layers = 1
        projector = ProjectedLlavaForConditionalGeneration(config).model.multi_modal_projector
    parameters = sum(parameter.numel() for parameter in projector.parameters())
    assert (config.image_seq_length, parameters) == PUBLISHED[name]


def small():
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 7,
    }
    text = FAMILIES["llava"]().model.config.text_config
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=120)
    return randomise(LlavaForConditionalGeneration(config), 0)


def inputs(tokens, batch=2):
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(3, 119, (batch, 8), generator=generator)
    image = torch.full((batch, tokens), 120)
    ids = torch.cat([words[:, :3], image, words[:, 3:]], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 42, 42, generator=generator)}


@pytest.mark.parametrize("name", SMALL)
def test_a_projector_learns_and_the_stock_weights_are_shared(name):
    stock, tokens = small(), SMALL[name]
    torch.manual_seed(0)
    model = with_projector(stock, name).requires_grad_(False)
    assert model.lm_head.weight is stock.lm_head.weight
    projector = model.model.multi_modal_projector.requires_grad_(True)
    asked = inputs(tokens)
    optimiser = torch.optim.Adam(projector.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**asked, labels=asked["input_ids"]).loss
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in projector.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", SMALL)
def test_lowered_it_costs_to_the_last_flop_what_it_computes_and_obeys_plans(name):
    model, tokens = with_projector(small(), name).eval().requires_grad_(False), SMALL[name]
    graph = lower_model(model, name)
    assert graph.properties["image_tokens"] == tokens
    asked = inputs(tokens, batch=1)
    sizes = Workload.default(graph, tokens, 8, 0).prefill()
    model.set_attn_implementation("eager")
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        whole = model(**asked, logits_to_keep=1).logits
    assert sum(operator_flops(operator, sizes) for operator in graph) == counter.get_total_flops()
    planner.compile(model, budget=0.7, utilities="uniform")
    assert not planner.plan_of(model).is_dense
    assert not torch.allclose(model(**asked, logits_to_keep=1).logits, whole)
    planner.restore(model)
    torch.testing.assert_close(model(**asked, logits_to_keep=1).logits, whole)


@pytest.mark.parametrize(
    ("name", "tokens"),
    {
        "token-packer:7": 1,
        "c-abstractor:3": 9,
        "resampler:5": 5,
        "pixel-shuffle:7": 1,
        "ldp-v2:3": 9,
    }.items(),
)
def test_a_folder_is_planned_and_run_by_its_name(tmp_path, capsys, name, tokens):
    stock, processor, _ = load_model(str(write_small_llava(tmp_path / "stock", vision_layers=4)))
    model, folder = with_projector(stock, name), tmp_path / "projected"
    model.save_pretrained(folder)
    fitted_processor(processor, model.config).save_pretrained(folder)
    Image.new("RGB", (90, 60), (200, 30, 30)).save(tmp_path / "red.png")
    again, fitted, _ = load_model(str(folder))
    asked = prompt_inputs(again, fitted, "What?", Image.open(tmp_path / "red.png"))
    assert int((asked["input_ids"] == again.config.image_token_index).sum()) == tokens
    torch.testing.assert_close(again(**asked).logits, model(**asked).logits)
    assert execute(["compile", "--model", str(folder), "--budget", "0.7", "-o", str(tmp_path)]) == 0
    question = ["-p", "What?", "-i", str(tmp_path / "red.png"), "--new-tokens", "2", "--json"]
    plan = ["--plan", str(tmp_path / "plan.yaml")]
    capsys.readouterr()
    assert execute(["run", "--model", str(folder), *plan, *question]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"]


def test_its_config_is_known_once_it_is_read(monkeypatch, tmp_path):
    with_projector(small(), "c-abstractor:3").save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr("planner.planning.catalog.import_module", asked.append)
    assert type(find_model(str(tmp_path)).load_config()) is ProjectedLlavaConfig
    assert asked == ["planner.models.projectors"]


def test_an_export_is_read_back(tmp_path):
    model = with_projector(small(), "c-abstractor:3").eval()
    graph = lower_model(model, "projected")
    asked = inputs(9)
    plan = plan_of(graph, layers_off=(1,), heads={0: (0,)})
    export(model, graph, plan, tmp_path / "out", asked)
    with obeying(model, graph, plan):
        expected = model(**asked).logits
    torch.testing.assert_close(load(tmp_path / "out")(**asked).logits, expected)


def test_tokens_attend_to_their_own_square_alone():
    """A changed patch changes one token of TokenPacker, but for the resized query's neighbours."""
    projector = with_projector(small(), "token-packer:2").model.multi_modal_projector.eval()
    features = torch.randn(1, 36, 4 * 32)
    changed = features.clone()
    changed[0, 6 * 2 + 3, : 3 * 32] += 1  # row 2, column 3: the square (1, 1); not the last layer
    moved = (projector(changed) - projector(features)).abs().sum(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [1 * 3 + 1]


def test_pixel_shuffle_puts_a_square_row_by_row_into_one():
    projector = with_projector(small(), "pixel-shuffle:2").model.multi_modal_projector
    seen = []
    projector.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    numbers = torch.arange(36.0)[None, :, None].expand(1, 36, 32)
    projector(numbers)
    assert seen[0][0, 4, ::32].tolist() == [14, 15, 20, 21]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("token-packer:4", "divide 6"),
        ("token-packer:x", "scale must be"),
        ("c-abstractor:7", "from 1 to 6"),
        ("resampler:0", "tokens must be"),
        ("q-former", "unknown projector"),
    ],
)
def test_what_does_not_fit_is_said(name, words):
    with pytest.raises(InputError, match=words):
        with_projector(small(), name)


def test_inspect_prices_it(capsys):
    arguments = ["inspect", "--model", "tiny-llava", "--projector", "c-abstractor:3", "--json"]
    assert execute(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["image_tokens"] == 9
    assert any(
        "abstractor" in row["name"] or row["part"] == "projector" for row in document["operators"]
    )
