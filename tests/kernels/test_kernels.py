"""Every kernel, interpreted, against its twin in float64."""

import pytest
import torch
from blocks import assert_close
from kernel_cases import CASES, NAMED, ROWS, case_of, cast_inputs

from planner.kernels.triton.launch import counted, recorded
from planner.kernels.triton.registry import KERNELS
from planner.kernels.triton.tiles import TARGETS


def test_every_kernel_has_its_row():
    assert {name: len([*kernel.cases()]) for name, kernel in NAMED.items()} == ROWS
    assert len(KERNELS) == len(NAMED)


@pytest.mark.parametrize(("name", "index"), CASES, ids=[f"{n} {i}" for n, i in CASES])
def test_a_kernel_computes_what_its_twin_does(name, index):
    """In float32, and every third case in half precision; what is left unwritten is NaN in both."""
    kernel, case = NAMED[name], case_of(name, index)
    for dtype in kernel.dtypes if index % 3 == 0 else kernel.dtypes[:1]:
        given = cast_inputs(case.inputs, dtype)
        want = kernel.twin(**cast_inputs(given, torch.float64))
        with counted() as counter:
            got = kernel(**given, **case.options)
        assert counter[name] == 1, case.name
        if not got.is_floating_point():
            assert torch.equal(got, want), case.name
            continue
        assert torch.equal(got.isnan(), want.isnan()), case.name
        assert_close(got.nan_to_num(0.0), want.nan_to_num(0.0), dtype)


@pytest.mark.parametrize("name", ROWS)
def test_every_kernel_predicts_its_time(name):
    kernel, case = NAMED[name], case_of(name, 0)
    inputs = {
        key: value.to("meta") if torch.is_tensor(value) else value
        for key, value in case.inputs.items()
    }
    with recorded(TARGETS["sm_90"]) as launches:
        kernel(**inputs, **case.options)
    seconds = [launch.kernel.seconds(launch, TARGETS["sm_90"]) for launch in launches]
    assert launches[0].kernel is kernel
    assert all(0 < taken < 1e-3 for taken in seconds)
