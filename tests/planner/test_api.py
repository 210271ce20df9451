"""Stock models under budgets, from Python and from the command line, on the shipped tiny-llava."""

import contextlib
import gc

import pytest
import torch
from PIL import Image
from small_llava import write_small_llava
from transformers import AutoModelForCausalLM, LlamaConfig

import planner
from planner.ir.errors import InputError
from planner.loading import load_image, load_model, prompt_inputs
from planner.models.running.kv_cache import kv_bytes


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny-llava")[:2]


@pytest.fixture
def model(loaded):
    yield loaded[0]
    with contextlib.suppress(InputError):
        planner.restore(loaded[0])


@pytest.fixture
def inputs(loaded):
    picture = Image.effect_noise((56, 56), 90).convert("RGB")
    return prompt_inputs(*loaded, "how many red circles are there ?", picture)


def tokens(model, inputs):
    return model.generate(**inputs, max_new_tokens=8, do_sample=False)


def test_budget_one_and_restore_are_the_base_model(model, inputs):
    with torch.inference_mode():
        base = model(**inputs).logits
    before = {name: id(p) for name, p in model.named_parameters()}
    assert planner.compile(model, budget=1.0) is model
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, base)
        with planner.budget(model, 0.5):
            assert not torch.equal(model(**inputs).logits, base)
        assert torch.equal(model(**inputs).logits, base)
    planner.restore(model)
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, base)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_budgets_nest_and_plans_are_made_once(model, inputs):
    planner.compile(model, budget=0.85)
    outer = planner.plan_of(model)
    with planner.budget(model, 0.5) as half:
        assert planner.plan_of(model) is half
        with planner.budget(model, 0.65) as more:
            assert planner.plan_of(model) is more
            tokens(model, inputs)
        assert planner.plan_of(model) is half
    assert planner.plan_of(model) is outer
    with planner.budget(model, 0.5) as again:
        assert again is half
    for plan, budget in ((half, 0.5), (more, 0.65), (outer, 0.85)):
        assert plan.cost["flops"]["fraction"] <= budget


def test_a_plan_from_a_file_is_obeyed(model, inputs, tmp_path):
    planner.compile(model, budget=0.6)
    planner.save_plan(planner.plan_of(model), tmp_path / "plan.yaml")
    first = tokens(model, inputs)
    planner.restore(model)
    planner.compile(model, plan=planner.load_plan(tmp_path / "plan.yaml"))
    assert torch.equal(tokens(model, inputs), first)


def test_a_selector_of_the_users_is_part_of_the_budget(model, inputs):
    planner.compile(model, budget=0.6, tokens="fastv:k=2,r=0.5", image_tokens=49, text_tokens=10)
    plan = planner.plan_of(model)
    assert [(s.layer, s.keep, s.of) for s in plan.tokens] == [(2, 24, 49)]
    assert 0.55 < plan.cost["flops"]["fraction"] <= 0.6
    tokens(model, inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": "prumerge+:ratio=0.25"},
        {"tokens": "prumerge+:max=0.5"},
        {"tokens": "visionzip:dominant=12,contextual=4"},
        {"tokens": "hired:ratio=0.5"},
        {"kv": "h2o:heavy=0.2,recent=0.1"},
        {"tokens": "fastv:k=2,r=0.5", "kv": "h2o:heavy=0.2,recent=0.1"},
    ],
    ids=lambda options: "+".join(options.values()),
)
def test_a_budget_holds_with_selectors_and_policies(model, inputs, options):
    """0.6 is 0.6 of the base model, whatever else is asked for; the cache is as large as priced."""
    prompt = inputs["input_ids"].shape[1]
    load = {"image_tokens": 49, "text_tokens": prompt - 49, "new_tokens": 7}
    planner.compile(model, budget=0.6, utilities="prior", **load, **options)
    plan = planner.plan_of(model)
    assert 0.55 < plan.cost["flops"]["fraction"] <= 0.6
    run = model.generate(
        **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    if "max" in options.get("tokens", ""):
        assert kv_bytes(run.past_key_values) <= plan.cost["kv"]["plan"]
    else:
        assert kv_bytes(run.past_key_values) == plan.cost["kv"]["plan"]


def test_the_plan_of_a_config_is_the_plan_of_the_model(model):
    from planner.planning.compiler import compile_plan
    from planner.planning.request import Request

    compiled = compile_plan(Request("tiny-llava", budget=0.7, text_tokens=10))
    planner.compile(model, budget=0.7, text_tokens=10)
    live = planner.plan_of(model)
    assert live.fingerprint == compiled.plan.fingerprint
    assert (live.heads, live.mlp, live.tokens) == (
        compiled.plan.heads,
        compiled.plan.mlp,
        compiled.plan.tokens,
    )


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda m: planner.compile(m, budget=2), "at most 1"),
        (lambda m: planner.compile(m, budgets=0.5), "unknown option"),
        (lambda m: planner.compile(m, budget="latency=5ms"), "device"),
        (lambda m: planner.compile(m, switches="wings"), "wings"),
        (lambda m: planner.compile(m, tokens="magic"), "magic"),
        (lambda m: planner.compile(m, tokens="prumerge"), "such as prumerge:max=0.25"),
        (
            lambda m: planner.compile(m, tokens="fastv:k=8"),
            "before decoder layer 8, .* has 8 layers",
        ),
        (lambda m: planner.compile(m, tokens="sparsevlm"), "before decoder layer 16"),
        (lambda m: planner.plan_of(m), "not compiled"),
        (lambda m: planner.restore(m), "not compiled"),
    ],
)
def test_bad_calls_leave_the_model_as_it_was(model, inputs, call, expected):
    base = tokens(model, inputs)
    with pytest.raises(InputError, match=expected):
        call(model)
    assert torch.equal(tokens(model, inputs), base)


def test_a_plan_of_another_model_is_refused(model, tmp_path):
    planner.compile(model, budget=0.6)
    plan = planner.plan_of(model)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64,
    )  # fmt: skip
    other = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match="was made for"):
        planner.compile(other, plan=plan)


def test_a_compiled_model_is_not_kept_alive():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64,
    )  # fmt: skip
    import weakref

    model = AutoModelForCausalLM.from_config(config).eval()
    planner.compile(model, budget=0.7, utilities="prior")
    seen = weakref.ref(model)
    planner.restore(model)
    del model
    gc.collect()
    assert seen() is None


# -- planner run and planner bench ----------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_noise((56, 56), 90).convert("RGB").save(path)
    return path


def test_run_answers_and_says_what_was_skipped(cli_json, picture):
    document = cli_json(
        "run", "--model", "tiny-llava", "--image", picture, "--prompt", "how many ?", "-b", "0.6"
    )
    assert set(document) >= {"answer", "tokens", "tokens_per_second", "skipped", "cost"}
    assert document["tokens"] >= 1
    assert document["skipped"]
    assert document["cost"]["flops"]["fraction"] <= 0.6


def test_run_says_what_an_adaptive_selector_kept(cli, cli_json, picture):
    arguments = ["run", "--model", "tiny-llava", "--image", picture, "--prompt", "how many ?"]
    arguments += ["--tokens", "prumerge:max=0.5", "--new-tokens", "3", "--explain"]
    document = cli_json(*arguments)
    (stage,) = document["image_tokens"]
    assert stage["layer"] == 0
    assert stage["of"] == 49
    assert 1 <= stage["kept"] < 24
    assert document["skipped"]["image tokens before layer 0"] == f"{49 - stage['kept']} of 49"
    ran = document["cost_of_this_prompt"]
    assert ran["flops"]["plan"] < document["cost"]["flops"]["plan"]
    assert document["kv_bytes"] == ran["kv"]["plan"]
    assert document["layers"][3]["image_tokens"].startswith(f"{stage['kept']} of 49, planned 24 (")
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert f"{ran['flops']['fraction']:.4f} of the base model's (the plan says" in out


def test_run_on_kernels(cli, cli_json, tmp_path):
    """Whichever computes, the answer is the same; the launches are counted, and told."""
    model = write_small_llava(tmp_path / "model", layers=2, heads=2)
    asked = ["run", "--model", model, "--prompt", "hello", "-b", "0.6", "--utilities", "prior"]
    asked += ["--new-tokens", "2"]
    by_torch = cli_json(*asked, "--kernels", "torch")
    by_triton = cli_json(*asked, "--kernels", "triton")
    assert by_triton["answer"] == by_torch["answer"]
    assert by_torch["launches"] == {}
    assert set(by_triton["launches"]) == {"attend", "project_columns", "project_rows"}
    _, out, _ = cli(*asked[:-1], "1", "--kernels", "triton")
    assert "launches of planner's kernels: attend" in out


def test_run_streams_what_it_answers(cli, cli_json, picture):
    """Word by word, and all of it: the first line is the answer that --json has."""
    asked = ["run", "--model", "tiny-llava", "--image", picture, "--prompt", "how many ?"]
    asked += ["--new-tokens", "6", "--utilities", "prior", "-b", "0.9"]
    document = cli_json(*asked)
    code, out, err = cli(*asked)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == document["answer"]
    assert cli(*asked, "--quiet")[1] == document["answer"] + "\n"


def test_run_takes_several_pictures(cli_json, picture):
    asked = ["run", "--model", "tiny-llava", "--prompt", "how many ?", "--utilities", "prior"]
    one, two = (cli_json(*asked, *["--image", picture] * n) for n in (1, 2))
    bases = [document["cost_of_this_prompt"]["kv"]["base"] for document in (one, two)]
    assert two["image_tokens"][0]["of"] == 98
    assert bases[1] > 1.5 * bases[0]


def test_run_keeps_to_its_budget_on_the_prompt(cli_json, picture):
    asked = ["run", "--model", "tiny-llava", "--utilities", "prior", "--prompt"]
    for question in ("how many ?", "how many red circles and blue squares are there in all ?"):
        for more in ([], ["--image", picture]):
            document = cli_json(*asked, question, *more, "--budget", "0.65")
            assert 0.6 < document["cost_of_this_prompt"]["flops"]["fraction"] <= 0.65


def test_run_without_an_image(cli):
    code, out, _ = cli("run", "--model", "tiny-llava", "--prompt", "hello", "-b", "0.7")
    assert code == 0
    assert "skipped" in out


def test_bench_reports_beside_the_base(cli_json):
    options = ["--budgets", "0.6,1", "--repeat", "1", "--decode", "2", "--text-tokens", "8"]
    rows = cli_json("bench", "--model", "tiny-llava", *options)["rows"]
    assert [row["budget"] for row in rows] == ["base", "0.6", "1"]
    assert rows[0]["prefill_ratio"] == rows[0]["decode_speedup"] == 1
    for row in rows:
        assert row["prefill_range"][0] <= row["prefill_ratio"] <= row["prefill_range"][1]
    assert rows[1]["kv_bytes"] < rows[0]["kv_bytes"] == rows[2]["kv_bytes"]


def test_bench_counts_all_tokens_of_a_batch_and_says_how_steady_it_was():
    from planner.cli.measuring import _row

    base, planned = [(2.0, 0.5, 7), (4.0, 0.5, 7), (3.0, 1.0, 7)], [(1.0, 0.25, 5)] * 3
    row = _row("0.5", 0.5, planned, base, batch=4)
    assert row["decode_tokens_per_second"] == 4 / 0.25
    assert row["prefill_range"] == [1 / 4, 1 / 2]
    assert row["decode_range"] == [2, 4]
    assert row["realised_over_ideal"] == pytest.approx((1 / 3) / 0.5)
    itself = _row("base", 1.0, base, base, 4)
    assert itself["prefill_range"] == [2 / 3, 4 / 3]
    last = base[1:]
    two = _row("base", 1.0, last, last, 4)
    assert (two["prefill_ratio"], two["decode_speedup"]) == (1, 1)
    assert two["decode_range"] == [0.75, 1.5]


def test_bench_takes_a_selector_and_a_policy(cli):
    options = ["--budgets", "0.6", "--repeat", "1", "--decode", "2", "--text-tokens", "8"]
    how = ["--tokens", "prumerge+:max=0.4", "--kv", "h2o:heavy=0.2,recent=0.2"]
    code, out, err = cli("bench", "--model", "tiny-llava", *options, *how)
    assert (code, err) == (0, "")
    base, planned = out.splitlines()[-2:]
    assert base.split()[:2] == ["base", "1.0000"]
    assert float(planned.split()[1]) <= 0.6


def test_images_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no image"):
        load_image(tmp_path / "absent.png")
    good = tmp_path / "good.png"
    Image.effect_noise((64, 64), 90).save(good)
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:200])
    with pytest.raises(InputError, match="broken"):
        load_image(cut)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match="broken"):
        load_image(tmp_path / "text.png")
    for side, expected in ((20000, "too many pixels"), (11000, "11000 x 11000")):
        Image.new("1", (side, side)).save(tmp_path / "huge.png")
        with pytest.raises(InputError, match=expected):
            load_image(tmp_path / "huge.png")


def test_pictures_are_read_as_they_are_meant(tmp_path):
    """16 bits are scaled rather than cut off, and a camera's orientation is obeyed."""
    import numpy as np

    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "deep.png"))[..., 0], levels // 256)
    turned = Image.new("RGB", (8, 4), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 8)
    Image.new("F", (4, 4), float("nan")).save(tmp_path / "nan.tiff")
    with pytest.raises(InputError, match="no finite numbers"):
        load_image(tmp_path / "nan.tiff")


def test_a_picture_of_one_pixel_works(cli, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    arguments = ["run", "--model", "tiny-llava", "--image", tmp_path / "dot.png"]
    code, out, err = cli(*arguments, "--prompt", "what ?", "--new-tokens", "2")
    assert code == 0, err
    assert out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--model", "tiny-llava", "--prompt", "x", "--image", "absent.png"], "no image"),
        (["run", "--model", "tiny-llava", "--prompt", "x", "--new-tokens", "0"], "at least 1"),
        (["run", "--model", "tiny-llava", "--prompt", "x", "--dtype", "int3"], "dtype"),
        (["run", "--model", "mipha-3b", "--prompt", "x"], "no weights"),
        (["run", "--model", "tiny-llava", "--prompt", "x", "--on", "moon"], "moon"),
        (["run", "--model", "tiny-llava", "--prompt", "x", "--kernels", "cuda"], "auto, triton"),
        (["bench", "--model", "tiny-llava", "--kernels", "fast"], "auto, triton, torch"),
        (["run", "--model", "tiny-llava"], "prompt"),
        (["run", "--model", "tiny-llava", "--prompt", "x", "--tokens", "hired"], "--image"),
        (["run", "--model", "tiny-llava", "--prompt", "x", "-b", "latency=5ms"], "needs --device"),
        (["bench", "--model", "tiny-llava", "--budgets", "a,b"], "not a list"),
        (["bench", "--model", "tiny-llava", "--repeat", "0"], "Invalid value for '--repeat'"),
        (["bench", "--model", "tiny-llava", "--text-tokens", "0"], "at least 1"),
    ],
)
def test_bad_input_to_run_and_bench(cli, arguments, expected):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert expected in err
