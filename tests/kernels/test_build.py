"""Generated kernels of LLaVA-1.5-7B under a plan, compiled for GPUs that are not here."""

import pytest
import torch

from planner.kernels.aot import compile_kernel
from planner.kernels.codegen import Origin, generate
from planner.kernels.shapes import AttentionShape, Block, MLPShape, NormShape
from planner.kernels.tiles import TARGETS
from planner.kernels.trial import load_source

RMS = NormShape("rms")
# Survivors in pieces, as a measured plan has them.
HEADS = (0, 1, 2, 5, 6, 9, 12, 13, 14, 15, 18, 20, 21, 22, 25, 26, 28, 29, 30, 31)
NEURONS = ((0, 688), (1032, 3096), (4128, 5504), (6192, 8256), (9288, 11008))
SHAPES = {
    "attention": AttentionShape(4096, 128, 1, 32, HEADS, 128, norm=RMS),
    "mlp": MLPShape(4096, 11008, NEURONS, "silu", norm=RMS),
}
# Kernels that the plan's constants change; the others are compiled in test_aot.
CHANGED = {"project_qkv_kernel", "project_up_kernel", "project_out_kernel", "attend_split_kernel"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("tokens", [424, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_fit_and_use_tensor_cores(shape, tokens, target, tmp_path):
    block = Block(SHAPES[shape], "decode" if tokens == 1 else "prefill", tokens, 704, 1, (7,))
    (source,) = generate([block], TARGETS[target], Origin("llava-7b", "0", "0"))
    assert "TABLES" not in source.text
    module = load_source(source, tmp_path)
    for kernel in source.kernels:
        if kernel.name not in CHANGED:
            continue
        compiled = compile_kernel(
            getattr(module, kernel.name),
            kernel.arguments,
            TARGETS[target],
            warps=kernel.warps,
            stages=kernel.stages,
        )
        assert compiled.spill_bytes == 0
        assert compiled.registers <= 255
        assert compiled.shared_bytes <= TARGETS[target].shared_bytes
        kind = "wgmma" if target == "sm_90" and tokens > 1 else "mma"
        assert compiled.tensor_core[kind] > 0
        # Weights and keys arrive in 16-byte vectors, copied while others are multiplied.
        assert ", 0x10" in compiled.ptx
        assert "cp.async" in compiled.ptx
        # At most the gain of a folded norm is read one by one.
        assert compiled.ptx.count("ld.global.b16") <= 1
        assert kernel.seconds > 0


def test_predictions_grow_with_what_survives():
    def predicted(kept, tokens):
        shape = MLPShape(4096, 11008, ((0, kept),), "silu", norm=RMS)
        block = Block(shape, "prefill", tokens, tokens, 1, (0,))
        (source,) = generate(
            [block], TARGETS["sm_90"], Origin("llava-7b", "0", "0"), dtype=torch.bfloat16
        )
        return sum(kernel.seconds for kernel in source.kernels)

    assert predicted(5504, 640) < predicted(8256, 640) < predicted(11008, 640)
    assert predicted(5504, 1) < 0.6 * predicted(11008, 1)
