"""``planner compile --target`` and ``planner kernels``."""

import re
import shutil

import pytest
import triton
from small_llava import write_small_llava

from planner.cli import execute as run
from planner.kernels.targets import build
from planner.kernels.targets.compilation import Compiled
from planner.kernels.targets.manifest import Resources, read_manifest
from planner.plan import load_plan

COMPILE = (
    *("compile", "--model", "tiny-llava", "--budget", "0.65"),
    *("--target", "sm_90", "--dtype", "bfloat16"),
)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, _own_cache):
    """A folder with the kernels of tiny-llava for any plan: the fewest there are."""
    folder = tmp_path_factory.mktemp("kernels") / "out"
    assert run([*COMPILE, "--index-driven", "-o", str(folder), "-q"]) == 0
    return folder


@pytest.fixture
def copy(compiled, tmp_path):
    return shutil.copytree(compiled, tmp_path / "copy")


def test_compile_adds_sources_machine_code_and_a_manifest(compiled):
    manifest = read_manifest(compiled)
    assert manifest.index_driven
    assert {kernel.target for kernel in manifest.kernels} == {"sm_90"}
    phases = {phase for kernel in manifest.kernels for phase in kernel.phase.split(", ")}
    assert phases == {"prefill", "decode"}
    home = compiled / "kernels"
    listed = {"manifest.json"}
    for kernel in manifest.kernels:
        assert f"def {kernel.function}(" in (home / kernel.source).read_text()
        assert (home / kernel.cubin).read_bytes().startswith(b"\x7fELF")
        assert (kernel.spill_bytes <= 32, kernel.registers <= 255) == (True, True)
        assert kernel.predicted_us > 0
        listed |= {kernel.source, kernel.cubin, kernel.metadata}
    files = {str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()}
    assert files == listed
    assert load_plan(compiled / "plan.yaml").model == "tiny-llava"
    assert {path.name for path in compiled.iterdir()} == {"plan.yaml", "graph.txt", "kernels"}


def test_a_second_run_compiles_nothing(cli_json, compiled, monkeypatch):
    found = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda **facts: found.append(facts["cache_hit"])
    )
    document = cli_json(*COMPILE, "--index-driven", "-o", "again")
    assert found
    assert all(found)
    assert document["kernels"] == read_manifest(compiled).model_dump(mode="json")
    assert document["solver"]["status"] == "optimal"


def test_a_table_by_target(cli, compiled):
    code, out, err = cli("kernels", compiled)
    assert (code, err) == (0, "")
    assert "sm_90" in out
    assert "registers" in out
    assert "self_attn.o_proj" in out
    code, verbose, _ = cli("kernels", compiled, "-v")
    assert code == 0
    assert "tile" in verbose.partition("\n---")[0]


def test_json_is_the_manifest(cli_json, compiled):
    assert cli_json("kernels", compiled) == read_manifest(compiled).model_dump(mode="json")
    assert cli_json("kernels", compiled, "--target", "sm_90")["kernels"]


def spoil(path, text):
    path.write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda home: (home / "manifest.json").unlink(), "planner compile --target makes them"),
        (lambda home: spoil(home / "manifest.json", '{"planner_'), "truncated or not JSON"),
        (lambda home: spoil(home / "manifest.json", "[]"), "not a manifest"),
        (lambda home: spoil(home / "manifest.json", '{"planner_kernels": 9}'), "format 9"),
        (lambda home: spoil(home / "manifest.json", '{"planner_kernels": 2}'), "broken at model"),
        (lambda home: next(home.rglob("*.cubin")).unlink(), "cannot be read: compile again"),
        (lambda home: spoil(next(home.rglob("*.cubin")), "x"), "was changed or cut off"),
        (lambda home: next(home.rglob("*.py")).unlink(), "cannot be read: compile again"),
    ],
)
def test_broken_kernels_are_one_sentence(cli, copy, damage, said):
    damage(copy / "kernels")
    code, out, err = cli("kernels", copy)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_kernels_of_another_plan_are_refused(cli, copy):
    assert cli("compile", "--model", "tiny-llava", "--budget", "0.5", "-o", copy)[0] == 0
    code, _, err = cli("kernels", copy)
    assert code == 2
    assert "of another plan" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compile", "--model", "tiny-llava", "--target", "sm_70"], "choose from sm_80"),
        (["compile", "--model", "tiny-llava", "--index-driven"], "name a --target"),
        (["compile", "--model", "tiny-llava", "--dtype", "float16"], "name a --target"),
        (["compile", "--model", "tiny-llava", "--target", "sm_80", "--dtype", "int8"], "in int8"),
        (["kernels", "nowhere"], "there are no kernels in 'nowhere'"),
    ],
)
def test_bad_requests_are_one_sentence_and_write_nothing(cli, tmp_path, arguments, said):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_not_there(cli, compiled):
    code, _, err = cli("kernels", compiled, "--target", "sm_80")
    assert code == 2
    assert "for 'sm_80'" in err


def test_without_triton(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("planner.cli.kernels.find_spec", lambda name: None)
    code, _, err = cli(*COMPILE, "-o", "out")
    assert code == 2
    assert "needs triton" in err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_compilation_leaves_what_was_there(cli, copy, monkeypatch):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    def fail(*_, **__):
        raise RuntimeError("no assembler")

    monkeypatch.setattr(build, "compile_kernel", fail)
    code, _, err = cli(*COMPILE, "-o", copy)
    assert code == 1
    assert "no assembler" in err
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_autotune_without_a_gpu(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = cli(*COMPILE, "--autotune", "-o", "out")
    assert code == 2
    assert "there is none here" in err
    assert not (tmp_path / "out").exists()


# -- running --------------------------------------------------------------------------------------

RUN = ("run", "--model", "tiny-llava", "--prompt", "hello", "--new-tokens", "3")


def test_run_by_generated_kernels(cli, cli_json, monkeypatch, tmp_path):
    """All launches are served, and the answer is PyTorch's; another plan's kernels are refused."""
    nothing = Resources(registers=0, spill_bytes=0, shared_bytes=0, mma=0, wgmma=0)
    made = Compiled(nothing, "{}", "", b"")
    monkeypatch.setattr(build, "compile_kernel", lambda *_, **__: made)
    model = write_small_llava(tmp_path / "model", layers=2, heads=2)
    shape = ("--image-tokens", "0", "--text-tokens", "12", "--switches", "layers,heads,mlp")
    target = ("--target", "sm_90", "--dtype", "float32")
    for name, budget in (("out", "0.65"), ("other", "0.5")):
        asked = ["compile", "--model", model, "--budget", budget, *shape, *target]
        asked += ["--utilities", "prior"]
        assert cli(*asked, "-o", name)[0] == 0
    planned = (*RUN, "--model", model, "--plan", tmp_path / "out" / "plan.yaml")
    by_torch = cli_json(*planned, "--kernels", "torch")
    ran = cli_json(*planned, "--kernels", "out")
    assert "generated" not in by_torch
    assert ran["answer"] == by_torch["answer"]
    assert ran["launches"]
    assert ran["generated"] == ran["launches"]
    text = cli(*planned, "--new-tokens", "1", "--kernels", "out")[1]
    assert re.search(r"served by generated kernels: (\d+) of \1\b", text)
    code, out, err = cli(*planned, "--kernels", "other")
    assert (code, out) == (2, "")
    assert "of another plan" in err


def test_run_by_kernels_of_another_dtype(cli, compiled):
    code, _, err = cli(*RUN, "--plan", compiled / "plan.yaml", "--kernels", compiled)
    assert code == 2
    assert "compute in bfloat16, and the model is in float32: run it with --dtype bfloat16" in err


def test_run_by_a_folder_without_kernels(cli, tmp_path):
    code, _, err = cli(*RUN, "--kernels", tmp_path)
    assert code == 2
    assert "there are no kernels in" in err
