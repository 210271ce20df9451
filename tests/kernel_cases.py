"""The cases that kernels bring along. A new kernel is a row of `ROWS`."""

from dataclasses import replace
from itertools import islice

import torch
from blocks import assert_close

from planner.kernels.triton.launch import counted
from planner.kernels.triton.registry import KERNELS

# How many cases each kernel has.
ROWS = {
    "project_rows": 18,
    "project_columns": 6,
    "attend": 33,
    "join_splits": 2,
    "score_tokens": 2,
    "choose_tokens": 3,
    "gather_tokens": 2,
}
NAMED = {kernel.name: kernel for kernel in KERNELS}
CASES = [(name, index) for name, count in ROWS.items() for index in range(count)]


def case_of(name, index):
    torch.manual_seed(0)
    return next(islice(NAMED[name].cases(), index, None))


def cast_inputs(inputs, dtype):
    """A call of an op with its floating tensors in another dtype."""
    return changed(inputs, lambda x: x.to(dtype) if x.is_floating_point() else x)


def changed(inputs, change):
    """A call of an op with other tensors."""
    tensors = {name: value for name, value in vars(inputs).items() if torch.is_tensor(value)}
    return replace(inputs, **{name: change(value) for name, value in tensors.items()})


def compare_with_twin(kernel, case, dtypes):
    """Run a case in some dtypes; what is left unwritten must be NaN in kernel and twin alike."""
    for dtype in dtypes:
        given = cast_inputs(case.inputs, dtype)
        want = cast_inputs(given, torch.float64).twin()
        with counted() as counter:
            got = kernel(given, **case.options)
        assert counter[kernel.name] == 1, case.name
        if not got.is_floating_point():
            assert torch.equal(got, want), case.name
            continue
        assert torch.equal(got.isnan(), want.isnan()), case.name
        assert_close(got.nan_to_num(0.0), want.nan_to_num(0.0), dtype)
