"""VoCo tokens: against the stock model under a mask made in loops, in the cache, trained, saved."""

from contextlib import contextmanager

import pytest
import torch
from families import IMAGE_END, cached
from PIL import Image
from plans import plan_of

from planner.cli import execute
from planner.ir.cost import Workload
from planner.ir.cost.device_table import device
from planner.ir.errors import InputError
from planner.loading import load_model, prompt_inputs
from planner.models.running.kv_cache import kv_bytes
from planner.models.running.skipping import obeying, session_on
from planner.models.tokens.summed_up import TOKEN
from planner.plan import TokenStage
from planner.planning.pricing import Pricing
from planner.planning.switches import AXES, SwitchSet, with_switches
from planner.training.recipes import load_recipe

NEW = 5


@contextmanager
def with_voco_token(model, token=IMAGE_END):
    """The token that closes an image in the tests' prompts stands for VoCo tokens."""
    model.config.voco_token_id = token
    try:
        yield model
    finally:
        del model.config.voco_token_id


def prompts(family, batch, **options):
    """Prompts with two VoCo tokens behind the image."""
    inputs = family.inputs(batch, before=(1, 4), after=(6, 9), **options)
    ids = inputs["input_ids"]
    for row in range(batch):
        ids[row, (ids[row] == IMAGE_END).nonzero()[0, 0] + 1] = IMAGE_END
    return inputs


@torch.no_grad()
def naive(model, ids, pixels):
    """Logits of a prompt and of greedy tokens behind it, all computed anew for each of them."""
    found = []
    for _ in range(NEW):
        vocos = [place for place, token in enumerate(ids[0].tolist()) if token == IMAGE_END]
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        for query in range(ids.shape[1]):
            for key in range(query + 1):
                mask[0, 0, query, key] = query <= vocos[-1] or key >= vocos[0]
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, -1]
        found.append(logits)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return torch.cat(found)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_equals_the_stock_model_under_a_mask(llava, side):
    family, graph = llava
    inputs = prompts(family, 2, padding_side=side)
    with with_voco_token(family.model) as model:
        expected = torch.stack(
            [
                naive(model, inputs["input_ids"][row, mask.bool()][None], pixels[None])
                for row, (mask, pixels) in enumerate(
                    zip(inputs["attention_mask"], inputs["pixel_values"], strict=True)
                )
            ],
            1,
        )
        with obeying(model, graph, plan_of(graph, kv="voco")):
            mask = inputs["attention_mask"]
            output = model(**inputs, use_cache=True)
            last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
            found = [output.logits[range(2), last]]
            for _ in range(NEW - 1):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
                # Behind padding on the right the stock model would leave a gap.
                positions = mask.sum(1, keepdim=True) - 1
                if side == "left":
                    positions = torch.full_like(positions, mask.shape[1] - 1)
                output = model(
                    input_ids=found[-1].argmax(-1, keepdim=True),
                    attention_mask=mask,
                    position_ids=positions,
                    **cached(model, output.past_key_values),
                )
                found.append(output.logits[:, -1])
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_with_a_cache_equals_without_and_image_entries_are_gone(llava):
    family, graph = llava
    inputs = prompts(family, 1)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    plan = plan_of(graph, kv="voco", heads={1: (0,)}, layers_off=(2,))
    with with_voco_token(family.model) as model, obeying(model, graph, plan):
        run = model.generate(**inputs, **options)
        again = model.generate(**inputs, **options, use_cache=False)
        assert torch.equal(run.sequences, again.sequences)
        last = torch.full((1, 1), 5)
        mask = torch.ones(1, run.sequences.shape[1] + 1, dtype=torch.long)
        with pytest.raises(InputError, match="head of a conversation"):
            model(
                input_ids=torch.full((1, 2), IMAGE_END),
                attention_mask=torch.cat([mask, mask[:, :1]], 1),
                **cached(model, run.past_key_values),
            )
        second = model(input_ids=last, attention_mask=mask, **cached(model, run.past_key_values))
        assert second.logits.isfinite().all()
    before = int((inputs["input_ids"][0] == IMAGE_END).nonzero()[0, 0])
    stored = inputs["input_ids"].shape[1] - before + NEW
    assert run.past_key_values.layers[0].keys.shape[2] == stored


@torch.no_grad()
def test_the_cache_holds_no_more_bytes_than_it_was_priced_at(llava):
    family, lowered = llava
    graph = with_switches(lowered, 7)
    inputs, stage = prompts(family, 1), TokenStage(0, 9, 16, "uniform")
    for stages in ((), (stage,)):
        plan = plan_of(graph, kv="voco", tokens=stages)
        with with_voco_token(family.model) as model, obeying(model, graph, plan):
            run = model.generate(
                **inputs, max_new_tokens=NEW + 1, do_sample=False, return_dict_in_generate=True
            )
        switches = SwitchSet("all", AXES, token_layers=(0,), token_selector="uniform")
        workload = Workload(16, inputs["input_ids"].shape[1] - 16, NEW, 1, 16)
        pricing = Pricing(graph, workload, switches.with_kv_policy("voco"), device("v100"))
        front = int((inputs["input_ids"][0] == IMAGE_END).nonzero()[0, 0]) - 16
        each = pricing.cost_of(plan)["kv"] // (workload.text_tokens + NEW)
        assert kv_bytes(run.past_key_values) == pricing.cost_of(plan)["kv"] - front * each


def test_what_cannot_be_summed_up_is_said(llava):
    family, graph = llava
    session = session_on(family.model, graph)
    plan = plan_of(graph, kv="voco")
    with pytest.raises(InputError, match="voco_token_id"):
        session.obey(plan)
    with with_voco_token(family.model) as model:
        model.config.voco_token_id = 5000
        session.close()
        with obeying(model, graph, plan), pytest.raises(InputError, match="one image a prompt"):
            model(**family.inputs())
        fastv = plan_of(graph, kv="voco", tokens=(TokenStage(2, 8, 16, "fastv"),))
        with pytest.raises(InputError, match="take another selector"):
            session_on(model, graph).obey(fastv)


def test_a_trained_one_is_asked_by_its_own_template(tmp_path, capsys):
    settings = ("max_steps=2", "batch_size=2", "save_steps=2", "voco_tokens=3")
    run, export = tmp_path / "run", tmp_path / "model"
    train, config = load_recipe(
        "training/configs/voco.yaml", [*settings, f"output_dir={run}", f"export_dir={export}"]
    )
    train(config)
    model, processor, _ = load_model(str(export))
    picture = Image.new("RGB", (56, 56), (200, 30, 30))
    picture.save(tmp_path / "red.png")
    inputs = prompt_inputs(model, processor, "What?", picture)
    text = processor.tokenizer.decode(inputs["input_ids"][0]).replace(" ", "")
    assert text.replace("<image>", "") == f"<s>{TOKEN * 3}USER:what?ASSISTANT:"
    capsys.readouterr()
    asked = ["run", "--model", str(export), "--kv", "voco", "-i", str(tmp_path / "red.png")]
    assert execute([*asked, "-p", "What?", "--new-tokens", "2", "--utilities", "prior"]) == 0
