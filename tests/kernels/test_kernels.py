"""Every kernel, interpreted, against its twin in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import CASES, NAMED, ROWS, case_of, changed, compare_with_twin

from planner.kernels.triton.interpreter import OutOfBounds
from planner.kernels.triton.kernel import Case, Kernel, tensor_bytes
from planner.kernels.triton.launch import recorded
from planner.kernels.triton.registry import KERNELS
from planner.kernels.triton.tiles import TARGETS


def test_every_kernel_has_its_row():
    assert {name: len([*kernel.cases()]) for name, kernel in NAMED.items()} == ROWS
    assert len(KERNELS) == len(NAMED)


@pytest.mark.parametrize(("name", "index"), CASES, ids=[f"{n} {i}" for n, i in CASES])
def test_a_kernel_computes_what_its_twin_does(name, index):
    """In float32, and every third case in half precision."""
    kernel = NAMED[name]
    dtypes = kernel.dtypes if index % 3 == 0 else kernel.dtypes[:1]
    compare_with_twin(kernel, case_of(name, index), dtypes)


@pytest.mark.parametrize("name", ROWS)
def test_every_kernel_predicts_its_time(name):
    kernel, case = NAMED[name], case_of(name, 0)
    with recorded(TARGETS["sm_90"]) as launches:
        kernel(changed(case.inputs, lambda x: x.to("meta")), **case.options)
    seconds = [launch.kernel.seconds(launch, TARGETS["sm_90"]) for launch in launches]
    assert launches[0].kernel is kernel
    assert all(0 < taken < 1e-3 for taken in seconds)


# -- CONTRIBUTING.md, "Add a kernel" --------------------------------------------------------------


@triton.jit
def scale_rows_kernel(x, factor, out, width, BLOCK: tl.constexpr):
    """out = factor[row] * x."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + column, mask=column < width, other=0.0)
    value = value.to(tl.float32) * tl.load(factor + row).to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=column < width)


@dataclass(frozen=True)
class Scaled:
    """What it computes."""

    x: torch.Tensor
    factor: torch.Tensor
    error: float = 0.0

    def twin(self):
        return self.x * self.factor[:, None] * (1 + self.error)


class ScaleRows(Kernel):
    """A kernel that somebody adds."""

    function = scale_rows_kernel
    multiplies = False
    shift = 0

    def __call__(self, inputs):
        x, out = inputs.x, torch.empty_like(inputs.x)
        given = {"x": x, "factor": inputs.factor, "out": out, "width": x.shape[1] + self.shift}
        self.start((len(x),), given | {"BLOCK": 64})
        return out

    def seconds(self, launch, target):
        return target.roofline(0, tensor_bytes(launch))

    def cases(self):
        yield Case("odd", Scaled(torch.randn(5, 37), torch.randn(5)))


def test_add_a_kernel():
    """Its file is all that the test of every kernel needs to know."""
    kernel = ScaleRows()
    (case,) = kernel.cases()
    compare_with_twin(kernel, case, kernel.dtypes)
    kernel.shift = 1
    with pytest.raises(OutOfBounds, match="scale_rows_kernel reads"):
        compare_with_twin(kernel, case, kernel.dtypes)
    kernel.shift = 0
    with pytest.raises(AssertionError):
        compare_with_twin(kernel, Case("wrong", replace(case.inputs, error=0.01)), kernel.dtypes)
