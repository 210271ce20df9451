import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from planner.kernels.launch import launch


@triton.jit
def twice(x):
    return x + x


@triton.jit
def probe_kernel(x, total, product, doubled, rows, N: tl.constexpr):
    i = tl.arange(0, N)
    cell = i[:, None] * N + i[None, :]
    a = tl.load(x + cell, mask=(i < rows)[:, None], other=0.0)
    tl.store(total + i, tl.sum(a.to(tl.float32), axis=1))
    tl.store(product + cell, tl.dot(a, tl.trans(a)))
    tl.store(doubled + cell, twice(a.to(tl.float32)).to(tl.bfloat16))


def _probe(rows: int) -> dict:
    x = torch.randn(16, 16).bfloat16()
    arguments = {
        "x": x,
        "total": torch.empty(16),
        "product": torch.empty(16, 16),
        "doubled": torch.empty(16, 16, dtype=torch.bfloat16),
        "rows": rows,
        "N": 16,
    }
    launch(probe_kernel, (1,), arguments)
    return arguments


def test_bfloat16_is_computed_with_as_on_a_gpu():
    got = _probe(11)
    x = got["x"].float()
    x[11:] = 0
    torch.testing.assert_close(got["total"], x.sum(dim=1))
    torch.testing.assert_close(got["product"], x @ x.T)
    torch.testing.assert_close(got["doubled"], (2 * x).bfloat16(), rtol=0, atol=0)


def test_float32_rounds_to_the_nearest_bfloat16():
    third = torch.randn(16, 16) / 3
    assert not torch.equal((2 * third).bfloat16().float(), 2 * third)
    arguments = _probe(16) | {"x": third}
    launch(probe_kernel, (1,), arguments)
    assert torch.equal(arguments["doubled"], (2 * third).bfloat16())


def test_nothing_stays_patched():
    before = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, tl.load, tl.core.load
    _probe(16)
    assert before == (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        tl.load,
        tl.core.load,
    )
    with pytest.raises(RuntimeError, match=r"Cannot call @triton\.jit"):
        twice(1)
