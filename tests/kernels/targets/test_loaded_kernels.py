"""Generated kernels in a folder: built, loaded, and what is refused."""

import shutil

import pytest
import torch
import triton
from families import FAMILIES

from planner.files import write_folder
from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.kernels.targets.autotune import on_device
from planner.kernels.targets.build import build_kernels
from planner.kernels.targets.compilation import compiling_for
from planner.kernels.targets.loaded_kernels import Loaded, load_kernels
from planner.kernels.targets.manifest import read_manifest
from planner.kernels.targets.plan_launches import calls_of, launches_of
from planner.kernels.triton.launch import launch
from planner.kernels.triton.registry import KERNELS
from planner.kernels.triton.tiles import TARGETS, tiles_chosen_by
from planner.plan import Plan, TokenStage

WORKLOAD = Workload(16, 8, 4)


@pytest.fixture(scope="module")
def graph():
    return lower_model(FAMILIES["llava"]().model, "llava")


@pytest.fixture(scope="module")
def plan(graph):
    return Plan(
        graph.name,
        str(graph.properties["fingerprint"]),
        graph.layers,
        layers_off=(1,),
        heads={0: (1,), 3: (0,)},
        mlp={0: (0, 2), 2: (), 3: (1, 3)},
        mlp_switches={0: 4, 2: 4, 3: 5},
        tokens=(TokenStage(2, 5, 16, "fastv"),),
    )


@pytest.fixture(scope="module")
def folder(graph, plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    targets = {"sm_90": TARGETS["sm_90"]}
    _, files = build_kernels(graph, plan, WORKLOAD, targets, dtype=torch.float32)
    write_folder(folder / "kernels", files)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def launches(graph, plan, workload, target="sm_90"):
    """Of a plan, on CPU tensors."""
    calls, _ = calls_of(graph, plan, workload, torch.float32)
    return [on_device(each, "cpu") for _, each in launches_of(calls, TARGETS[target])]


def result(each):
    """What a launch writes, among zeros."""
    name = {"score_tokens": "scores", "choose_tokens": "chosen"}.get(each.kernel.name, "out")
    each.arguments[name].zero_()
    launch(each)
    return each.arguments[name].clone()


@pytest.mark.parametrize("workload", [WORKLOAD, Workload(16, 9, 7, batch=2)])
def test_every_launch_of_the_plan_is_served(graph, plan, folder, workload):
    """At the lengths it was compiled for, and at others."""
    loaded = load_kernels(folder)
    for each in launches(graph, plan, workload):
        want = result(each)
        with loaded.used():
            assert torch.equal(result(each), want), each.kernel.name
    assert loaded.missed == {}
    assert set(loaded.served) == {kernel.name for kernel in KERNELS} - {"join_splits"}


def test_launches_of_another_plan_are_missed(graph, plan, folder):
    other = Plan(graph.name, plan.fingerprint, graph.layers, mlp={0: (1,)}, mlp_switches={0: 4})
    with load_kernels(folder).used() as loaded:
        for each in launches(graph, other, WORKLOAD):
            if each.arguments.get("gate_weight") is not None:
                launch(each)
    assert (loaded.served, set(loaded.missed)) == ({}, {"project_rows"})


def test_tiles_are_those_of_the_folder(graph, plan, folder):
    """Of the target that it was compiled for, of as many rows or of the closest number."""
    asked = []
    with tiles_chosen_by(asked.append):
        launches(graph, plan, Workload(16, 100, 4))
    loaded = load_kernels(folder)
    known = {tile for _, tile in loaded.manifest.tiles}
    assert asked
    with loaded.used():
        for wanted in asked:
            tile = loaded._tile(wanted)
            assert tile is not None
            assert tile.block_m <= wanted.rows
            assert tile in known


def test_machine_code_is_what_triton_would_launch(graph, plan, folder, monkeypatch, tmp_path):
    """On the GPU that it is for nothing is compiled, wherever the folder was written."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "empty"))
    found = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda **facts: found.append(facts["cache_hit"])
    )
    loaded = Loaded(folder, read_manifest(folder), "sm_90", on_gpu=True)
    calls, _ = calls_of(graph, plan, WORKLOAD, torch.float32)
    with compiling_for(TARGETS["sm_90"]):
        for _, each in launches_of(calls, TARGETS["sm_90"]):
            kernel = loaded.kernel_for(each)
            arguments = {name: each.arguments[name] for name in kernel.function.arg_names}
            kernel.function.warmup(
                grid=(1,),
                **arguments,
                num_warps=kernel.row.warps,
                num_stages=kernel.row.stages,
                enable_fp_fusion=True,
            )
    assert found
    assert all(found)


def test_of_another_plan_or_model(graph, plan, folder):
    loaded = load_kernels(folder)
    loaded.check(graph, plan, torch.float32)
    with pytest.raises(InputError, match="compute in float32, and the model is in float16"):
        loaded.check(graph, plan, torch.float16)
    other = Plan(graph.name, plan.fingerprint, graph.layers)
    with pytest.raises(InputError, match="of another plan"):
        loaded.check(graph, other, torch.float32)
    with pytest.raises(InputError, match="of another model, 'llava'"):
        loaded.check(lower_model(FAMILIES["phi"]().model, "phi"), plan, torch.float32)


def test_changed_files_are_refused(copy):
    source = min((copy / "kernels").rglob("*.py"))
    source.write_text(source.read_text() + "# changed\n")
    with pytest.raises(InputError, match="was changed or cut off: compile again"):
        load_kernels(copy)


def test_for_another_gpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(InputError, match="no kernels for this GPU, sm_86"):
        load_kernels(folder, "cuda")


def test_equal_input_gives_equal_bytes(graph, plan, folder):
    targets = {"sm_90": TARGETS["sm_90"]}
    _, files = build_kernels(graph, plan, WORKLOAD, targets, dtype=torch.float32)
    home = folder / "kernels"
    assert {name: (home / name).read_bytes() for name in files} == files
