"""Whole small models through generated kernels, interpreted: a prompt and two decoded tokens."""

import pytest
import torch
from families import FAMILIES
from plans import plan_of

import planner
from planner.files import write_folder
from planner.ir.cost import Workload
from planner.ir.lowering import lower_model
from planner.kernels.targets import build
from planner.kernels.targets.compilation import Compiled
from planner.kernels.targets.loaded_kernels import load_kernels
from planner.kernels.targets.manifest import Resources
from planner.kernels.triton.launch import counted
from planner.kernels.triton.tiles import TARGETS
from planner.plan import TokenStage

TOLERANCE = 2e-6
TARGET = {"sm_90": TARGETS["sm_90"]}


@pytest.fixture(autouse=True)
def _no_machine_code(monkeypatch):
    """Sources are interpreted here; test_compilation compiles them."""
    nothing = Resources(registers=0, spill_bytes=0, shared_bytes=0, mma=0, wgmma=0)
    made = Compiled(nothing, "{}", "", b"")
    monkeypatch.setattr(build, "compile_kernel", lambda *_, **__: made)


def plans(family, graph):
    """Layers, heads, neurons and tokens off, a block with nothing left; and another."""
    heads, mlp = {0: (1,), 2: ()}, {0: (0, 3, 4), 2: (6,)}
    tokens = (TokenStage(2, 5, 16, "fastv"),) if family.image_tokens else ()
    return [
        plan_of(graph, layers_off=(1,), heads=heads, mlp=mlp, tokens=tokens),
        plan_of(graph, heads={0: (0,)}, mlp={1: (2, 3)}),
    ]


def answers(model, inputs):
    """Logits of the prompt's tokens, and of three decoded ones: the first and two more."""
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        prompt = model(**inputs).logits[inputs["attention_mask"].bool()]
        made = model.generate(**inputs, **options, return_dict_in_generate=True)
    return [prompt, *made.logits]


def run(family, graph, made_for, plan, inputs, folder, index_driven=False):
    """Build for one plan, run under one; what was loaded, after comparing with PyTorch."""
    text = inputs["input_ids"].shape[1] - family.image_tokens
    workload = Workload(family.image_tokens, text, 2)
    options = {"dtype": torch.float32, "index_driven": index_driven}
    _, files = build.build_kernels(graph, made_for, workload, TARGET, **options)
    write_folder(folder / "kernels", files)
    loaded = load_kernels(folder)
    model = family.model
    planner.compile(model, plan=plan, kernels="torch")
    want = answers(model, inputs)
    planner.compile(model, plan=plan, kernels="triton")
    with loaded.used(), counted() as counter:
        got = answers(model, inputs)
    planner.restore(model)
    assert counter == loaded.served + loaded.missed
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= TOLERANCE * other.norm()
    return loaded


# GQA and images; norms of queries and keys, and padding; windows.
@pytest.mark.parametrize(("name", "padded"), [("llava", False), ("qwen3", True), ("gemma3", False)])
def test_every_launch_of_a_plan_is_served(name, padded, tmp_path):
    family = FAMILIES[name]()
    graph = lower_model(family.model, name)
    inputs = family.inputs(batch=2, before=(3, 6)) if padded else family.inputs(batch=1)
    plan, _ = plans(family, graph)
    loaded = run(family, graph, plan, plan, inputs, tmp_path)
    assert loaded.missed == {}
    kinds = {"project_rows", "project_columns", "attend"}
    stage = {"score_tokens", "choose_tokens", "gather_tokens"} if family.image_tokens else set()
    assert set(loaded.served) == kinds | stage


def test_index_driven_kernels_serve_any_plan(tmp_path):
    family = FAMILIES["llava"]()
    graph = lower_model(family.model, "llava")
    plan, _ = plans(family, graph)
    inputs = family.inputs(batch=2, before=(3, 6))
    stages = {"tokens": plan.tokens}
    loaded = run(family, graph, plan_of(graph, **stages), plan, inputs, tmp_path, index_driven=True)
    assert loaded.missed == {}
    loaded.check(graph, plan, torch.float32)


def test_launches_of_another_plan_run_all_the_same(tmp_path):
    family = FAMILIES["qwen3"]()
    graph = lower_model(family.model, "qwen3")
    plan, other = plans(family, graph)
    loaded = run(family, graph, other, plan, family.inputs(batch=1), tmp_path)
    assert loaded.missed["project_rows"]
    assert loaded.served["attend"]
