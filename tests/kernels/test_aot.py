"""Every kernel, compiled ahead of time for GPUs that are not here."""

import pytest
import torch

from planner.kernels.aot import Compiled, compile_launch, specialization
from planner.kernels.catalogue import catalogue, decoder_layer
from planner.kernels.launch import recorded
from planner.kernels.tiles import TARGETS, target_of

NAMES = tuple(catalogue(TARGETS["sm_80"]))
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
MATRIX_KERNELS = (
    "project_qkv_kernel",
    "project_up_kernel",
    "project_out_kernel",
    "attend_kernel",
    "attend_split_kernel",
    "attend_stock_kernel",
    "score_kernel",
    "merge_kernel",
)


def _compiled(name: str, target: str, dtype: torch.dtype = torch.bfloat16) -> Compiled:
    return compile_launch(catalogue(TARGETS[target], dtype)[name], TARGETS[target])


def _check(compiled: Compiled) -> None:
    assert compiled.spill_bytes == 0
    assert compiled.registers <= 255
    assert compiled.shared_bytes <= SHARED_LIMIT[compiled.target]
    assert compiled.cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_fit_and_use_tensor_cores(name, target):
    compiled = _compiled(name, target)
    _check(compiled)
    if compiled.name not in MATRIX_KERNELS:
        return
    many_rows = name.startswith(("prefill", "stock prefill", "tokens/merge", "vision"))
    kind = "wgmma" if target == "sm_90" and many_rows else "mma"
    assert compiled.tensor_core[kind] > 0
    # Weights and keys arrive in 16-byte vectors; a lost alignment hint makes them 2-byte loads.
    assert ", 0x10" in compiled.ptx
    assert "cp.async" in compiled.ptx
    if not name.startswith("vision"):  # whose biases are read one by one, once per program
        assert "ld.global.b16" not in compiled.ptx


def test_a_longer_prompt_compiles_nothing_new():
    compiled_for = []
    for tokens in (520, 577, 640, 1001):
        with recorded(TARGETS["sm_90"]) as launches:
            decoder_layer(torch.bfloat16, tokens)
        compiled_for.append(
            [
                (x.kernel.fn.__name__, specialization(x.kernel, x.arguments), x.warps, x.stages)
                for x in launches
            ]
        )
    assert all(other == compiled_for[0] for other in compiled_for)


def test_float16_and_float32_compile_too():
    for dtype in (torch.float16, torch.float32):
        compiled = _compiled("decode/project_up_kernel", "sm_90", dtype)
        assert compiled.spill_bytes == 0


def test_every_kernel_is_in_the_catalogue():
    kernels = {name.split("/")[1].split(" ")[0] for name in NAMES}
    assert kernels == {
        *MATRIX_KERNELS,
        "normalize_kernel",
        "join_splits_kernel",
        "choose_kernel",
        "gather_kernel",
    }


def test_limits_are_those_of_the_targets():
    for name, limit in SHARED_LIMIT.items():
        assert TARGETS[name].shared_bytes == limit
        assert target_of(divmod(int(name[3:]), 10)) is TARGETS[name]
