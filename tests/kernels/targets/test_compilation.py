"""The launches of LLaVA-1.5-7B under a plan, compiled for GPUs that are not here."""

import pytest
import torch

from planner.ir.cost import Workload
from planner.ir.lowering import lower_config
from planner.kernels.targets.compilation import compile_kernel, compiling_for
from planner.kernels.targets.keys import key_of
from planner.kernels.targets.plan_launches import calls_of, launches_of
from planner.kernels.targets.sources import load_function, sources_of
from planner.kernels.triton.registry import KERNELS
from planner.kernels.triton.tiles import TARGETS, target_of
from planner.plan import Plan, TokenStage
from planner.planning.catalog import find_model

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


@pytest.fixture(scope="module")
def graph():
    """LLaVA-1.5-7B with two decoder layers."""
    config = find_model("llava-7b").load_config()
    config.text_config.num_hidden_layers = 2
    return lower_config(config, "llava-7b").graph


@pytest.fixture(scope="module")
def plan(graph):
    """Survivors in pieces, as a measured plan has them; a token stage."""
    heads = (0, 1, 2, 5, 6, 9, 12, 13, 14, 15, 18, 20, 21, 22, 25, 26, 28, 29, 30, 31)
    groups = (0, 1, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 18, 19, 20, 21, 22, 23, 27, 28, 29, 30, 31)
    return Plan(
        graph.name,
        str(graph.properties["fingerprint"]),
        graph.layers,
        heads={1: heads},
        mlp={1: groups},
        mlp_switches={1: 32},
        tokens=(TokenStage(1, 288, 576, "fastv"),),
    )


def launches(graph, plan, target, *, text_tokens=64, dtype=torch.bfloat16):
    """Of the narrowed layer, a prompt and one token."""
    calls, _ = calls_of(graph, plan, Workload(576, text_tokens, 1), dtype)
    return launches_of([call for call in calls if call.layer == 1], TARGETS[target])


def check(name, made, target, kernel, many_rows):
    # A few words at most: what saves a barrier, or lets one program more reside.
    assert made.resources.spill_bytes <= 32, name
    assert made.resources.registers <= 255, name
    assert made.resources.shared_bytes <= SHARED_LIMIT[target], name
    assert made.cubin.startswith(b"\x7fELF"), name
    if kernel.multiplies:
        kind = "wgmma" if target == "sm_90" and many_rows else "mma"
        assert getattr(made.resources, kind) > 0, name
        # Weights and keys arrive in 16-byte vectors; a lost alignment hint makes them 2-byte loads.
        assert ", 0x10" in made.ptx, name
        assert "cp.async" in made.ptx, name
        assert "ld.global.b16" not in made.ptx, name


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_kernels_fit_and_use_tensor_cores(graph, plan, target, tmp_path):
    """As they are, and with the plan's numbers in them."""
    made = launches(graph, plan, target)
    assert {launch.kernel for _, launch in made} == {*KERNELS}
    sources = sources_of(made, any_plan=False)
    with compiling_for(TARGETS[target]):
        seen = set()
        for source in sources:
            launch = source.launch
            many_rows = source.calls[0].phase == "prefill" and launch.kernel.name != "score_tokens"
            options = {"warps": launch.warps, "stages": launch.stages}
            if key_of(launch, any_plan=True) not in seen:
                seen.add(key_of(launch, any_plan=True))
                function = launch.kernel.function
                compiled = compile_kernel(function, launch.arguments, **options)
                check(source.name, compiled, target, launch.kernel, many_rows)
            if {"units", "counts"}.isdisjoint(launch.arguments):
                continue
            path = tmp_path / f"{source.name}.py"
            path.write_text(source.text(target, "llava-7b"))
            function = load_function(path, source.function)
            options["stages"] = source.stages
            compiled = compile_kernel(function, source.arguments, **options)
            check(f"generated {source.name}", compiled, target, launch.kernel, many_rows)


def test_a_longer_prompt_compiles_nothing_new(graph, plan):
    """Nor does a longer cache, until its keys are divided among more programs."""

    def keys(tokens, phase):
        made = launches(graph, plan, "sm_90", text_tokens=tokens)
        return {key_of(launch, any_plan=False) for call, launch in made if call.phase == phase}

    for tokens in (1, 90, 223):
        assert keys(tokens, "prefill") == keys(64, "prefill")
    assert keys(90, "decode") == keys(64, "decode")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_compile_too(graph, plan, dtype):
    _, launch = next(
        (call, launch)
        for call, launch in launches(graph, plan, "sm_90", dtype=dtype)
        if launch.arguments.get("gate_weight") is not None and call.phase == "decode"
    )
    with compiling_for(TARGETS["sm_90"]):
        options = {"warps": launch.warps, "stages": launch.stages}
        assert compile_kernel(launch.kernel.function, launch.arguments, **options).cubin


def test_limits_are_those_of_the_targets():
    for name, limit in SHARED_LIMIT.items():
        assert TARGETS[name].shared_bytes == limit
        assert target_of(divmod(int(name[3:]), 10)) is TARGETS[name]
