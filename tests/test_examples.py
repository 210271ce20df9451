"""The examples, on tiny-llava."""

import re
from pathlib import Path

import apart
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Run a script of the repository in an empty folder, with one cache for all: its stdout."""
    cache = tmp_path_factory.getbasetemp() / "planner-cache"

    def run(path, *arguments, folder):
        environment = {"PLANNER_CACHE": str(cache), "MPLBACKEND": "Agg"}
        done = apart.run(ROOT / path, *arguments, folder=folder, environment=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_plan_from_python(script, tmp_path):
    from planner.plan import load_plan

    arguments = [
        "--model",
        "tiny-llava",
        "--budgets",
        "0.5",
        "0.8",
        "--limits",
        "flops=0.7",
        "kv=0.5",
    ]
    out = script("examples/plan_from_python.py", *arguments, "-o", "plans", folder=tmp_path)
    plans = {path.stem: load_plan(path) for path in (tmp_path / "plans").iterdir()}
    assert set(plans) == {"flops-0.5", "flops-0.8", "several-limits"}
    fractions = {name: plan.cost["flops"]["fraction"] for name, plan in plans.items()}
    assert fractions["flops-0.5"] <= 0.5 < fractions["flops-0.8"] <= 0.8
    assert fractions["several-limits"] <= 0.7
    assert plans["several-limits"].cost["kv"]["fraction"] <= 0.5
    assert out.count("optimal") == 3


def test_inspect_costs(script, tmp_path):
    from PIL import Image

    arguments = ["--model", "tiny-llava", "--devices", "a100-40g", "h200", "-o", "roofline.png"]
    out = script("examples/inspect_costs.py", *arguments, folder=tmp_path)
    assert out.count("prefill of 113 on") == 2
    assert out.count("decoder linear") == 4
    with Image.open(tmp_path / "roofline.png") as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
        assert picture.width > 1000
    # A plot, and not an empty page.
    assert len(colours) > 100


def test_torch_compile(script, tmp_path):
    arguments = ["--inner", "eager", "--new-tokens", "1", "--budgets", "0.9", "0.6"]
    first, second = script("examples/torch_compile.py", *arguments, folder=tmp_path).splitlines()
    assert first.startswith("budget 0.9: ")
    assert not first.endswith(" 0 graphs compiled")
    assert second.endswith(" 0 graphs compiled")


def test_train_lora(script, tmp_path):
    """What the plan costs is made up for by training, in part; the folder gives it back."""
    arguments = ["--steps", "20", "--batch", "8", "--rank", "4", "-o", "lora"]
    arguments.append("--gradient-checkpointing")
    out = script("examples/train_lora.py", *arguments, folder=tmp_path)
    whole, planned, trained, loaded = map(float, re.findall(r"loss ([\d.]+)$", out, re.MULTILINE))
    assert planned > 2 * whole
    assert trained < 0.8 * planned
    assert loaded == trained
