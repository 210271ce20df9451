"""The cases that kernels bring along. A new kernel is a row of `ROWS`."""

from itertools import islice

import torch

from planner.kernels.triton.registry import KERNELS

# How many cases each kernel has.
ROWS = {
    "project_rows": 12,
    "project_up": 6,
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
    return {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
