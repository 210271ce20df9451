"""What switches are worth by default, and plans whose losses are made up for, as users ask for."""

import functools
import json

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import planner
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.export import load
from planner.plan import Plan, load_plan
from planner.planning.catalog import tiny_llava_folder

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 64}


def language_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval()


def texts(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (1, 24), generator=generator)} for _ in range(count)]


def outputs(model, inputs):
    with torch.no_grad():
        return [model(**one).logits for one in inputs]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "abc":
        Image.effect_noise((56, 56), 90).convert("RGB").save(folder / f"{name}.png")
    return folder


def test_a_plain_compile_measures_and_remembers(cache):
    model = language_model()
    steps = []
    how = {"inputs": texts(), "progress": lambda done, total: steps.append((done, total))}
    planner.compile(model, 0.7, **how)
    plan = planner.plan_of(planner.compile(model, 0.7, **how))
    assert plan.provenance["utilities"].startswith("first-order-kl-")
    assert [done for done, total in steps].count(steps[-1][1]) == 1
    planner.compile(model, 0.7, inputs=texts(seed=1))
    assert planner.plan_of(model).provenance["utilities"] != plan.provenance["utilities"]
    assert len(list((cache / "utilities").iterdir())) == 2
    assert not model.training


def test_with_a_plan_the_first_budget_measures(cache):
    model = language_model()
    planner.compile(model, plan=Plan.of(lower_model(model, "model")))
    assert not (cache / "utilities").exists()
    with pytest.raises(InputError, match="device"):
        planner.budget(model, "latency=1ms")
    assert not (cache / "utilities").exists()
    with planner.budget(model, 0.7) as plan:
        assert plan.provenance["utilities"].startswith("first-order-kl-")
    assert len(list((cache / "utilities").iterdir())) == 1
    planner.compile(language_model(), 0.7)
    assert len(list((cache / "utilities").iterdir())) == 1


def test_what_one_call_measured_is_what_later_budgets_know(cache):
    model = language_model()
    planner.oneshot(model, texts(), 0.8, recover="")
    plan = planner.budget(model, 0.6).plan
    assert plan.provenance["utilities"].startswith("first-order-kl-")


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_torch_compiles_is_measured_at_its_first_call(cache, in_place):
    model, options = language_model(), {"budget": 0.7, "inner": "eager"}
    compiled = model if in_place else torch.compile(model, backend="planner", options=options)
    if in_place:
        model.compile(backend="planner", options=options)
    with torch.inference_mode():
        compiled(**texts()[0])
    plan = planner.plan_of(compiled)
    assert plan.provenance["utilities"].startswith("first-order-kl-")
    torch.compiler.reset()
    planner.compile(eager := language_model(), 0.7, switches="layers,heads,mlp")
    outputs(eager, texts(1))
    assert plan.key == planner.plan_of(eager).key


def test_a_model_in_training_is_measured_as_it_answers_and_trains_on(cache):
    model = language_model().train()
    model.model.layers[1].eval()
    planner.compile(model, 0.7, inputs=texts())
    assert model.training
    assert not model.model.layers[1].training
    assert model.model.layers[0].mlp.training


def test_without_inputs_a_language_model_is_measured_on_what_it_writes(cache):
    model = planner.compile(language_model(), 0.7)
    assert planner.plan_of(model).provenance["utilities"].startswith("first-order-kl-")


def test_weight_norms_say_where_no_inputs_can_be_made(cache):
    """A model of pictures without a processor."""
    family = FAMILIES["llava"]()
    planner.compile(family.model, 0.7)
    assert planner.plan_of(family.model).provenance["utilities"].startswith("magnitude-")
    planner.restore(family.model)


def test_magnitude_keeps_what_is_large(cache):
    model = language_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e-3
    planner.compile(model, 0.75, utilities="magnitude", switches="mlp", mlp_groups=1)
    plan = planner.plan_of(model)
    assert plan.mlp[1] == ()
    assert 0 not in plan.mlp


def test_tiny_llava_ships_what_was_measured_on_it(cli_json, cache):
    about = json.loads(str(np.load(tiny_llava_folder() / "utilities.npz")["about"]))
    assert about["measure"] == "kl"
    found = cli_json("compile", "--model", "tiny-llava", "--budget", "0.6", "-o", "out")
    assert found["utilities"] == "utilities.npz"
    asked = ("run", "--model", "tiny-llava", "--prompt", "how many red circles are there ?")
    assert cli_json(*asked, "--budget", "0.6")["utilities"] == "utilities.npz"
    assert not (cache / "utilities").exists()


@functools.cache
def refitted():
    """(base outputs, narrowed, narrowed and refitted), of one model and plan."""
    model, inputs = language_model(), texts(40)
    base = outputs(model, texts(4, seed=9))
    options = {"switches": "mlp", "mlp_groups": 8}
    planner.compile(model, 0.75, recover="refit", inputs=inputs, **options)
    plan = planner.plan_of(model)
    with pytest.raises(InputError, match="recovered for one plan"):
        planner.budget(model, 0.9)
    found = outputs(model, texts(4, seed=9))
    planner.restore(model)
    return base, found, plan, model


def test_refit_holds_until_restore_and_plans_that_count_on_it_are_refused_without():
    base, found, plan, model = refitted()
    assert all(map(torch.equal, base, outputs(model, texts(4, seed=9))))
    assert plan.provenance["recover"] == "refit"
    with pytest.raises(InputError, match="counts on recovered weights"):
        planner.compile(model, plan=plan)
    planner.compile(model, 0.75, utilities="prior", switches="mlp", mlp_groups=8)
    with pytest.raises(InputError, match="counts on recovered weights"):
        planner.budget(model, plan)
    plain = outputs(model, texts(4, seed=9))
    planner.restore(model)

    def distance(some):
        return sum(float((a - b).square().mean()) for a, b in zip(base, some, strict=True))

    assert distance(found) < 0.7 * distance(plain)


def test_one_call_exports_what_one_call_computes(tmp_path, cache):
    model, inputs = language_model(), texts(20)
    options = {"budget": 0.7, "switches": "heads,mlp", "ignore": ["mlp.0"]}
    done = planner.oneshot(model, inputs, output_dir=tmp_path / "out", **options)
    plan = done.compiled.plan
    assert 0 not in plan.mlp
    assert plan.mlp or plan.heads
    before = outputs(language_model(), inputs)
    assert all(map(torch.equal, before, outputs(model, inputs)))
    planner.oneshot(model, inputs, **options)
    assert planner.plan_of(model).key == plan.key
    for a, b in zip(outputs(model, inputs), outputs(load(tmp_path / "out"), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compile_with_data_writes_a_recovered_checkpoint(cli_json, pictures, tmp_path):
    asked = ("compile", "--model", "tiny-llava", "--images", pictures, "--budget", "0.6")
    found = cli_json(*asked, "--recover", "refit", "--keep", "layer.0,heads.3", "-o", "out")
    plan = load_plan(tmp_path / "out/plan.yaml")
    assert found["recovered"] > 0
    assert found["measured"].startswith("removal chains")
    assert not {0} & {*plan.layers_off, *plan.heads, *plan.mlp}
    assert 3 not in plan.heads
    assert (tmp_path / "out/planner.safetensors").is_file()


def test_text_calibrates_too(cli_json, tmp_path):
    (tmp_path / "text.txt").write_text("how many red circles are there ? " * 200)
    asked = ("calibrate-utilities", "--model", "tiny-llava", "--text", "text.txt", "--samples", "2")
    found = cli_json(*asked, "--method", "taylor", "-o", "u.npz")
    assert found["samples"] == 2
    cli_json("compile", "--model", "tiny-llava", "--utilities", "u.npz", "-o", "out")
    cli_json(*asked, "--method", "refit", "-o", "r.npz")
    cli_json("compile", "--model", "tiny-llava", "--utilities", "r.npz", "-o", "refit")
    assert load_plan(tmp_path / "refit/plan.yaml").provenance["recover"] == "refit"


def test_heal_trains_a_plan_and_writes_what_it_learned(cli_json, tmp_path):
    (tmp_path / "text.txt").write_text("how many red circles are there ? " * 200)
    cli_json("compile", "--model", "tiny-llava", "--utilities", "prior", "-o", "plan")
    asked = ("heal", "--model", "tiny-llava", "--plan", "plan/plan.yaml", "--text", "text.txt")
    slow = ("--samples", "4", "--steps", "12", "--rank", "0", "--learning-rate", "3e-5")
    found = cli_json(*asked, *slow, "-o", "healed")
    assert found["kl_after"] < found["kl_before"]
    assert list((tmp_path / "healed").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--keep", "wing.0"), "wing.0"),
        (("--text", "nothing.txt", "--samples", "0"), "at least 1"),
        (("--recover", "prayer"), "unknown recovery"),
        (("--text", "nothing.txt"), "no text file"),
        (("--text", "a", "--images", "b"), "either"),
        (("--recover", "refit", "--utilities", "magnitude"), "give no utilities"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(cli, arguments, expected, tmp_path):
    code, _, err = cli("compile", "--model", "tiny-llava", "-o", "out", *arguments)
    assert code == 2
    assert expected in err
    assert not list((tmp_path / "out").glob("*"))
