"""The plan beside a planned model's weights: written by saving it, read by planner.load."""

import copy
import json
import logging
import pickle

import numpy as np
import peft
import pytest
import torch
from plans import plan_of
from torch import nn
from transformers import AutoModelForCausalLM

import planner
from planner.ir.errors import InputError
from planner.models.running.saving import SETTINGS, read_saved
from planner.planning.switches import with_switches
from planner.planning.utilities import Utilities, save_utilities

# Of transformers, about names that peft uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IDS = torch.arange(3, 14)[None]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture
def model(qwen3):
    return copy.deepcopy(qwen3[0].model)


@pytest.fixture
def plan(qwen3):
    return plan_of(qwen3[1], layers_off=(0,), heads={1: (1,)}, mlp={1: (0, 3, 5), 2: (2, 6)})


def own_files(folder):
    return sorted(path.name for path in folder.glob("planner*"))


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="planner")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "planner"]


def test_a_plan_is_restored_from_beside_the_weights(model, plan, tmp_path, said):
    stock = logits(model)
    planner.compile(model, plan=plan, freeze=True, kernels="torch")
    right = logits(model)
    model.save_pretrained(tmp_path)
    assert own_files(tmp_path) == ["planner_plan.yaml", SETTINGS]
    (message,) = said()
    assert f"the weights in '{tmp_path}' are not narrowed" in message
    read = planner.load(tmp_path)
    assert not read.training
    assert planner.plan_of(read) == plan
    assert torch.equal(logits(read), right)
    assert read_saved(tmp_path).options == {"freeze": True, "kernels": "torch"}
    # The weights are anybody's.
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), stock)
    assert torch.equal(logits(planner.restore(read)), stock)
    assert "save_pretrained" not in vars(read)


def test_utilities_and_options_come_along(model, qwen3, tmp_path):
    """So another budget means the same plan as before, though the measured file is gone."""
    graph = with_switches(qwen3[1])
    generator = torch.Generator().manual_seed(0)
    worth = {s.name: torch.rand(s.switches, generator=generator).numpy() for s in graph.sites}
    measured = tmp_path / "measured.npz"
    save_utilities(measured, Utilities("measured", worth, 1.0), graph)
    planner.compile(model, 0.7, utilities=measured, switches="heads,mlp", text_tokens=11)
    first = planner.plan_of(model)
    with planner.budget(model, 0.5) as half:
        model.save_pretrained(tmp_path / "half")
    model.save_pretrained(tmp_path / "model")
    measured.unlink()
    read = planner.load(tmp_path / "model")
    assert planner.plan_of(read) == first
    with planner.budget(read, 0.5) as again:
        assert again.key == half.key
        assert again.provenance["text_tokens"] == 11
    assert planner.plan_of(planner.load(tmp_path / "half")) == half
    # Saved once more, from where it was loaded.
    read.save_pretrained(tmp_path / "again")
    with planner.budget(planner.load(tmp_path / "again"), 0.5) as third:
        assert third.key == half.key


@torch.no_grad()
def test_a_budget_holds_for_every_prompt_again(model, tmp_path):
    planner.compile(model, 0.6, utilities="prior")
    model.save_pretrained(tmp_path)
    read = planner.load(tmp_path)
    for tokens in (5, 40, 11):
        ids = torch.arange(3, 3 + tokens)[None]
        assert torch.equal(read(input_ids=ids).logits, model(input_ids=ids).logits)
        assert planner.plan_of(read).cost == planner.plan_of(model).cost
    (tmp_path / SETTINGS).write_text((tmp_path / SETTINGS).read_text().replace("'0.6'", "'6'"))
    with pytest.raises(InputError, match="at most 1 of the base model"):
        planner.load(tmp_path)


def test_what_makes_up_for_a_plan_is_saved_with_it(model, plan, tmp_path):
    """Under other plans, too, a model that was read again says what the saved one does."""
    planner.compile(model, plan=plan, recover="compensate", inputs=[{"input_ids": IDS}])
    right, other = logits(model), 0.8
    with planner.budget(model, other):
        right_other = logits(model)
    model.save_pretrained(tmp_path)
    read = planner.load(tmp_path)
    assert torch.equal(logits(read), right)
    with planner.budget(read, other):
        assert torch.equal(logits(read), right_other)
    read.save_pretrained(tmp_path / "again")
    planner.compile(model, plan=plan)
    assert not torch.allclose(logits(model), right, atol=1e-3)
    means = (tmp_path / "planner_means.npz").read_bytes()
    assert (tmp_path / "again" / "planner_means.npz").read_bytes() == means


@pytest.mark.parametrize("broken", ["missing", "other", "numbers"])
def test_means_that_do_not_fit_are_refused(model, plan, tmp_path, broken):
    planner.compile(model, plan=plan, recover="compensate", inputs=[{"input_ids": IDS}])
    model.save_pretrained(tmp_path)
    path = tmp_path / "planner_means.npz"
    arrays = dict(np.load(path))
    name = min(arrays)
    if broken == "missing":
        path.unlink()
    else:
        arrays[name] = arrays[name][1:] if broken == "other" else arrays[name].astype(np.int64)
        np.savez(path, **arrays)
    with pytest.raises(InputError, match="means"):
        planner.load(tmp_path)


def test_samples_with_plans_of_their_own(model, plan, qwen3, tmp_path):
    planner.compile(model, plan=plan)
    both = (plan, plan_of(qwen3[1], layers_off=(1,)))
    with planner.budget(model, list(both)):
        right = model(IDS.expand(2, -1)).logits
        model.save_pretrained(tmp_path)
    assert own_files(tmp_path) == ["planner_plan_0.yaml", "planner_plan_1.yaml", SETTINGS]
    read = planner.load(tmp_path)
    assert planner.plan_of(read) == both
    assert torch.equal(read(IDS.expand(2, -1)).logits, right)


def test_adapters_are_restored_on_their_base(model, plan, tmp_path):
    model.save_pretrained(tmp_path / "base")
    assert own_files(tmp_path / "base") == []
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    wrapped = planner.compile(peft.get_peft_model(base, lora).eval(), plan=plan)
    right = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapters")
    assert not (tmp_path / "adapters" / "config.json").exists()
    read = planner.load(tmp_path / "adapters")
    assert isinstance(read, peft.PeftModel)
    assert torch.equal(logits(read), right)
    planner.restore(read)
    assert not torch.allclose(logits(read), right)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(planner.load(tmp_path / "merged")), right)
    config = tmp_path / "adapters" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": 1}))
    with pytest.raises(InputError, match="do not name their base model"):
        planner.load(tmp_path / "adapters")


def test_copies_save_themselves(model, plan, tmp_path):
    planner.compile(model, plan=plan)
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.model.layers[1].mlp.up_proj.weight.mul_(2)
        folder = tmp_path / str(number)
        twin.save_pretrained(folder)
        assert torch.equal(logits(planner.load(folder)), logits(twin))


def test_others_of_several_processes_write_nothing(model, plan, tmp_path):
    planner.compile(model, plan=plan)
    model.save_pretrained(tmp_path / "main")
    model.save_pretrained(tmp_path / "other", False)
    assert own_files(tmp_path / "main")
    assert own_files(tmp_path / "other") == []


def test_a_method_that_somebody_replaced_is_left_alone(model, plan):
    model.save_pretrained = print
    planner.compile(model, plan=plan)
    assert model.save_pretrained is print
    planner.restore(model)
    assert model.save_pretrained is print


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace("planner_settings: 1", "planner_settings: 2"), "planner_settings"),
        (lambda s: s.replace("plans: 1", "plans: 1000000"), "broken at plans"),
        (lambda s: s.replace("plans: 1", "plans: 2"), "no plan '.*planner_plan_0.yaml'"),
        (lambda s: s + "more: 1\n", "broken at more"),
        (lambda s: s.replace("kernels: auto", "kernels: cuda"), "choose from auto"),
        (lambda s: s.replace("freeze: false", "freeze: [[]]"), "broken at freeze"),
        (lambda s: s.replace("{}", "{trust_remote_code: true}"), "option 'trust_remote_code'"),
        (lambda s: s.replace("{}", "{budget: 0.1}"), "option 'budget'"),
        (lambda s: s.replace("{}", "{batch: x}"), "batch is 'x'"),
        (lambda s: s[:20], "settings"),
        (lambda s: "&a [*a]", "aliases are not read"),
        (lambda s: "x" * 10_000_000, "MiB"),
        (lambda s: "", "broken"),
    ],
)
def test_broken_settings_are_one_sentence(model, plan, tmp_path, change, message):
    planner.compile(model, plan=plan)
    model.save_pretrained(tmp_path)
    path = tmp_path / SETTINGS
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=message) as caught:
        planner.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_planned_model(model, plan, tmp_path):
    with pytest.raises(InputError, match="no settings"):
        planner.load(tmp_path / "absent")
    with pytest.raises(InputError, match="no plan was saved there"):
        planner.load(tmp_path)
    planner.compile(model, plan=plan)
    model.save_pretrained(tmp_path)
    other = tmp_path / "planner_plan.yaml"
    other.write_text(other.read_text().replace("layers_off: '0'", "layers_off: '1'"))
    with pytest.raises(InputError, match="digest does not match"):
        planner.load(tmp_path)
    planner.save_plan(plan_of(planner.api.graph_of(model), layers_off=(2,)), other)
    assert planner.plan_of(planner.load(tmp_path)).layers_off == (2,)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        planner.load(tmp_path)


def test_a_wrapper_without_a_method_of_its_own(model, plan, tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **inputs):
            return self.inner(**inputs)

    wrapped = planner.compile(Wrapper(), plan=plan)
    wrapped.inner.save_pretrained(tmp_path)
    assert torch.equal(logits(planner.load(tmp_path)), logits(wrapped))
    assert "save_pretrained" not in vars(wrapped)


def test_weights_that_were_refitted_are_in_the_file(model, tmp_path):
    planner.compile(model, 0.6, utilities="prior", recover="refit")
    model.save_pretrained(tmp_path)
    read = planner.load(tmp_path)
    assert planner.plan_of(read).key == planner.plan_of(model).key
    assert torch.equal(logits(read), logits(model))
