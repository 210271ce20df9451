import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

from planner.kernels.triton.interpreter import OutOfBounds, interpret


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
    interpret(probe_kernel, (1,), arguments)
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
    interpret(probe_kernel, (1,), arguments)
    assert torch.equal(arguments["doubled"], (2 * third).bfloat16())


def _patched():
    names = ("create_dot", "cast_impl", "create_masked_load", "create_masked_store")
    builder = [getattr(InterpreterBuilder, name) for name in names]
    return [*builder, interpreter._implicit_cvt, tl.load, tl.core.load]


def test_nothing_stays_patched():
    before = _patched()
    _probe(16)
    with pytest.raises(OutOfBounds):
        _copy(torch.zeros(4), torch.zeros(4), first=1)
    assert before == _patched()
    with pytest.raises(RuntimeError, match=r"Cannot call @triton\.jit"):
        twice(1)


# -- bounds ---------------------------------------------------------------------------------------


@triton.jit
def copy_kernel(x, y, first, step, count, to, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + first + i * step, mask=i < count)
    tl.store(y + to + i, value, mask=i < count)


def _copy(x, y, *, first=0, step=1, count=4, to=0):
    arguments = {"x": x, "y": y, "first": first, "step": step, "count": count, "to": to, "N": 8}
    interpret(copy_kernel, (1,), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_what_masks_hide_is_no_access(dtype):
    x, y = torch.arange(4).to(dtype), torch.zeros(4, dtype=dtype)
    _copy(x, y)
    assert torch.equal(x, y)
    _copy(x, y, first=-100, to=10**6, count=0)


@pytest.mark.parametrize("first", [-1, 1, -(10**6), 10**6])
def test_reading_one_element_too_many_fails(first):
    """Though the memory is the process's own, and on one side even the same storage."""
    whole = torch.arange(12.0)
    with pytest.raises(OutOfBounds, match=r"copy_kernel reads .* beyond 'x' of shape \(4,\)"):
        _copy(whole[4:8], torch.zeros(4), first=first)


@pytest.mark.parametrize("to", [-1, 1])
def test_writing_one_element_too_many_fails_and_leaves_others_alone(to):
    whole = torch.zeros(12)
    with pytest.raises(OutOfBounds, match="writes 1 elements beyond 'y'"):
        _copy(torch.ones(4), whole[4:8], to=to)
    assert not whole.any()


def test_one_tensor_is_not_reached_from_another():
    """Neighbours in memory, the second an argument as well."""
    whole = torch.arange(8.0)
    with pytest.raises(OutOfBounds, match="beyond 'x'"):
        _copy(whole[:4], whole[4:], first=4)


def test_between_the_rows_of_a_strided_tensor_nothing_is_read():
    rows = torch.arange(32.0).view(4, 8)[:, :2]
    column, y = rows[:, 1], torch.zeros(4)
    _copy(column, y, step=8)
    assert y.tolist() == [1, 9, 17, 25]
    _copy(rows, y, step=8)
    with pytest.raises(OutOfBounds, match=r"reads 2 elements beyond 'x' .* the first at 2"):
        _copy(rows, y)  # elements 0 and 1 are there, 2 and 3 lie between two rows
    with pytest.raises(OutOfBounds, match="beyond 'x'"):
        _copy(column, y, step=8, first=1)


def test_an_expanded_tensor_has_one_row():
    one = torch.arange(4.0).expand(5, 4)
    _copy(one, torch.zeros(4))
    with pytest.raises(OutOfBounds, match="beyond 'x'"):
        _copy(one, torch.zeros(4), first=4)


def test_of_nothing_nothing_is_read():
    with pytest.raises(OutOfBounds, match="beyond 'x'"):
        _copy(torch.zeros(0), torch.zeros(4), count=1)


def test_pointers_chosen_between_two_tensors_are_checked_each():
    @triton.jit
    def pick_kernel(x, y, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, tl.load(tl.where(i % 2 == 0, x, y) + i))

    x, y, out = torch.arange(8.0), torch.arange(8.0) + 10, torch.zeros(8)
    interpret(pick_kernel, (1,), {"x": x, "y": y, "out": out, "N": 8})
    assert out.tolist() == [0, 11, 2, 13, 4, 15, 6, 17]
    with pytest.raises(OutOfBounds, match="reads 1 elements beyond 'y'"):
        interpret(pick_kernel, (1,), {"x": x, "y": y[:7], "out": out, "N": 8})
