"""train, eval, experiment, and what a scheduler adds to compile and run, as users call them."""

import json

import pytest
from PIL import Image

SCHEDULED = ("--model", "tiny-llava", "--scheduler", "adallava-h")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    Image.new("RGB", (56, 56), "white").save(path)
    return str(path)


def test_a_schedule_is_compiled_and_run(cli, cli_json, picture, tmp_path):
    made = cli_json("compile", *SCHEDULED, "--budget", "0.65", "-o", "out")
    assert (made["limit"], made["of"]) == (4, 16)
    assert made["cost"]["flops"]["fraction"] == pytest.approx(0.625, abs=1e-3)
    asked = ("--prompt", "How many red objects are there?", "--image", picture)
    found = cli_json("run", "-m", "tiny-llava", "--plan", "out/schedule.yaml", *asked, "--explain")
    assert found["cost"]["flops"]["fraction"] == pytest.approx(0.625, abs=1e-3)
    layers = found["layers"]
    assert [row["on"] for row in layers[:4]] == [True] * 4
    kept = sum(len(row["heads"]) for row in layers[4:])
    assert kept == 4 * 2
    assert all(len(row["logits"]) == 16 for row in layers[4:])
    code, out, _ = cli("run", *SCHEDULED, "--budget", "0.65", *asked, "--explain")
    assert code == 0
    assert found["answer"] in out
    assert "heads kept" in out


def test_a_schedule_says_what_its_budget_does_not_count(cli, cli_json, tmp_path):
    """The latency token, the scheduler, and what AdaLLaVA's released code counts of them."""
    asked = ("compile", *SCHEDULED, "--budget", "0.65", "--text-tokens", "16", "-o", "out")
    made = cli_json(*asked, "--convention", "llm-viewer")
    width = 128
    assert made["overhead"]["scheduler"] == 2 * (256 * width + width**2 + width * 4 * 16)
    one_more = cli_json(*asked, "--text-tokens", "17")
    token = one_more["cost"]["flops"]["plan"] - made["cost"]["flops"]["plan"]
    assert made["overhead"]["latency_token"] == token > 0
    # As a plan of as many layers, on a prompt of two tokens more.
    layers = ("compile", "-m", "tiny-llava", "--budget", "0.65", "--convention", "llm-viewer")
    made = cli_json(*layers, "--scheduler", "adallava-l", "--text-tokens", "16", "-o", "out")
    static = cli_json(*layers, "--switches", "adallava-l", "--text-tokens", "18", "-o", "static")
    ours, theirs = made["published"]["flops"], static["convention"]["cost"]["flops"]
    assert (ours["plan"], ours["base"] < theirs["base"]) == (theirs["plan"], True)
    code, out, _ = cli(*asked)
    assert (code, "not counted:" in out, "of the latency token" in out) == (0, True, True)
    code, _, err = cli("compile", *SCHEDULED, "--budget", "0.3", "-o", "less")
    assert (code, "cannot keep to less than 0.5" in err) == (2, True)
    assert not (tmp_path / "less").exists()


def test_a_scheduled_run_says_what_an_adaptive_selector_kept(cli_json, picture):
    asked = ("--prompt", "How many red objects are there?", "--image", picture, "--explain")
    found = cli_json("run", *SCHEDULED, "--budget", "0.8", "--tokens", "prumerge:max=0.4", *asked)
    (stage,) = found["image_tokens"]
    assert (stage["layer"], stage["of"]) == (0, 49)
    assert 1 <= stage["kept"] <= 19
    assert found["cost_of_this_prompt"]["flops"]["plan"] <= found["cost"]["flops"]["plan"]
    assert found["layers"][0]["image_tokens"].startswith(f"{stage['kept']} of 49")


def test_a_selector_that_scores_by_attention_runs_in_front_of_a_scheduler(cli_json):
    asked = ("--tokens", "fastv:k=2,r=0.5", "--budgets", "0.85", "--samples", "4")
    skipped, masked = (cli_json("eval", *SCHEDULED, *asked, *how) for how in ((), ("--mask",)))
    assert skipped["results"] == masked["results"]


def test_a_static_plan_is_explained_too(cli_json, picture):
    found = cli_json(
        "run",
        "-m",
        "tiny-llava",
        "--image",
        picture,
        "--prompt",
        "why?",
        "-b",
        "0.6",
        "--utilities",
        "prior",
        "--explain",
    )
    assert len(found["layers"]) == 8
    assert found["layers"][2]["image_tokens"].endswith("(fastv)")


def test_accuracy_under_budgets(cli, cli_json):
    arguments = ("--budgets", "1,0.6", "--samples", "6")
    found = cli_json("eval", *SCHEDULED, *arguments)["results"]
    assert [row["budget"] for row in found] == [1, 0.6]
    assert [row["violations"] for row in found] == [0, 0]
    assert found[0]["cost_fraction"] == 1
    assert set(found[0]["families"]) == {
        "attribute",
        "count",
        "describe",
        "existence",
        "spatial",
        "text",
    }
    static = ("eval", "-m", "tiny-llava", "--budgets", "1", "--samples", "6", "--language-prior")
    measured = cli_json(*static)
    assert measured["results"][0]["cost_fraction"] == 1
    assert measured["language_prior"]["families"].keys() == found[0]["families"].keys()
    few = cli_json(*static, "--families", "text, count")
    assert few["families"] == ["text", "count"]
    for scored in (few["results"][0], few["language_prior"]):
        assert scored["families"].keys() == {"text", "count"}
    code, out, _ = cli("eval", *SCHEDULED, "--mask", "--language-prior", *arguments)
    assert code == 0
    assert "violations" in out
    assert "the best guess without the picture" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "none.yaml"), "there is no configuration"),
        (("train", "bad.yaml"), "is none of"),
        (("train", "good.yaml", "--set", "lerning_rate=1"), "did you mean"),
        (("eval", "-m", "tiny-llava", "--budgets", "1,x"), "is not a list"),
        (("eval", "-m", "tiny-llava", "--budgets", "1.5"), "at most 1"),
        (("eval", "-m", "tiny-llava", "--samples", "0"), "Invalid value for '--samples'"),
        (("eval", "-m", "tiny-llava", "--batch", "-1"), "Invalid value for '--batch'"),
        (("eval", "-m", "tiny-llava", "--mask"), "for a --scheduler"),
        (("eval", "-m", "tiny-llava", "--split", "dev"), "'dev' is not one of"),
        (("eval", "-m", "tiny-llava", "--families", "text,colour"), "family of questions 'colour'"),
        (("eval", "-m", "tiny-llava", "--families", ""), "no family of questions ''"),
        (("eval", "-m", "tiny-llava", "--families", "text,text"), "'text' is named twice"),
        (("eval", "-m", "llava-7b", "--scheduler", "adallava-l"), "was made for 'tiny-llava'"),
        (("experiment", "table9"), "unknown experiment"),
        (("experiment", "table1", "--seeds", "one"), "is not a list"),
        (("experiment", "table1", "--budgets", "0.5"), "table1 is measured whole"),
        (("experiment", "exp2", "--budgets", "half"), "is not a list"),
        (("experiment", "exp2", "--budgets", "0.5"), "its budgets are 0.8, 0.65"),
        (("experiment", "exp2", "--variants", "most"), "its variants are all; all, 900 steps"),
        (("compile", "-m", "tiny-llava", "--scheduler", "nowhere"), "no folder 'nowhere'"),
        (("compile", *SCHEDULED, "-b", "kv=1MiB"), "counts units"),
        (("compile", *SCHEDULED, "--tokens", "random:k=6,keep=4"), "behind the first switch"),
        (("run", "-m", "tiny-llava", "-p", "x", "--plan", "bad.yaml"), "not a plan"),
    ],
)
def test_bad_input_is_one_sentence(cli, tmp_path, arguments, sentence):
    (tmp_path / "bad.yaml").write_text("recipe: cake\n")
    (tmp_path / "good.yaml").write_text(json.dumps({"recipe": "adallava", "output_dir": "x"}))
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "build").exists()
