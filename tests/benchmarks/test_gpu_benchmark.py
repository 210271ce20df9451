"""The GPU benchmark on a CPU, in small: everything but its times."""

import importlib
import json
import sys
from pathlib import Path

import apart
import pytest
import torch

from planner.ir.lowering import lower_model
from planner.kernels.triton.project_columns import project_columns

FOLDER = Path(__file__).parents[2] / "benchmarks"
# As on a machine without OR-Tools.
BLOCKED = """
import runpy, sys
sys.modules["ortools"] = None
sys.argv[0] = sys.argv[1]
del sys.argv[1]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def decoders(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("gpu_decoders")
    for name in ("gpu", "gpu_decoders"):
        sys.modules.pop(name, None)


def test_all_parts_run_without_ortools(tmp_path):
    output = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "--batches", "1", "--rounds", "1", "--budgets", "0.5"]
    arguments += ["--output", output]
    done = apart.run("-c", BLOCKED, FOLDER / "gpu.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "they mean nothing" in done.stdout
    document = json.loads(output.read_text())
    assert document["problems"] == []
    assert document["meaningless"]
    rows = {(row["decoder"], row["kernels"], row["phase"]): row for row in document["decoders"]}
    kinds = ("layers", "heads and mlp", "tokens", "all")
    sides = [(kind, kernels) for kind in kinds for kernels in ("triton", "torch", "auto")]
    sides.append(("dense eager", "torch"))
    assert set(rows) == {(*side, phase) for side in sides for phase in ("prefill", "decode")}
    for kind in kinds:
        assert 0.3 < rows[kind, "triton", "prefill"]["ideal"] < 0.75
    kernels = {row["kernel"] for row in document["kernels"]}
    assert kernels >= {"prefill project_rows", "prefill attend", "decode project_rows"}
    assert kernels >= {"prefill project_rows op", "decode attend op"}
    assert all(row["microseconds"] > 0 for row in document["kernels"])


def test_without_a_gpu_it_says_so(decoders, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert importlib.import_module("gpu").main() == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_a_wrong_decoder_is_not_reported(decoders, monkeypatch):
    """Whatever a kernel returns that it should not, the check sees."""
    model = decoders.build(decoders.TINY, torch.device("cpu"))
    decoder = decoders.Decoder(model, lower_model(model, "llava"), decoders.TINY, 1)
    draw = decoders.Draw("heads and mlp", 0.5)
    decoder.check(draw)
    right = project_columns.start

    def wrong(grid, arguments, **options):
        right(grid, arguments, **options)
        arguments["out"] *= 1.3

    monkeypatch.setattr(project_columns, "start", wrong)
    with pytest.raises(ValueError, match="off the reference"):
        decoder.check(draw)


@pytest.mark.parametrize("budget", [0.85, 0.65, 0.5])
@pytest.mark.parametrize("kind", ["layers", "heads and mlp", "tokens", "all"])
def test_plans_of_the_7b_decoder_are_near_their_budget(decoders, kind, budget):
    """FLOPs by hand, on shapes alone."""
    size = decoders.LLAVA_7B
    draw = decoders.Draw(kind, budget)
    tokens = dict.fromkeys(range(decoders.STAGE), size.tokens)
    left = size.text_tokens + draw.image_tokens(size)

    def flops(heads, neurons, count):
        lanes = heads * size.head_dim
        return 2 * count * size.hidden * (4 * lanes + 3 * neurons) + 4 * count**2 * lanes

    work = sum(
        flops(
            len(draw.some(size.heads, index)),
            len(draw.neurons(size, index)),
            tokens.get(index, left),
        )
        for index in draw.layers_on(size)
    )
    whole = size.layers * flops(size.heads, size.neurons, size.tokens)
    assert abs(work / whole - budget) < 0.03


def test_what_was_measured_is_written_though_the_rest_is_not(decoders, monkeypatch, tmp_path):
    """A part that kills the run, as a time limit from outside does, costs itself alone."""
    gpu = importlib.import_module("gpu")
    output = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "--batches", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--output", str(output)])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "planned_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    document = json.loads(output.read_text())
    assert [row["decoder"] for row in document["decoders"]] == ["dense eager"] * 2
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    assert gpu.main() == 1
    problems = json.loads(output.read_text())["problems"]
    assert problems
    assert all(problem.endswith("no time left") for problem in problems)
