"""All kernels, a line each."""

from __future__ import annotations

from planner.kernels.ops.op import Op
from planner.kernels.triton.attend import attend
from planner.kernels.triton.choose_tokens import choose_tokens
from planner.kernels.triton.gather_tokens import gather_tokens
from planner.kernels.triton.join_splits import join_splits
from planner.kernels.triton.kernel import Kernel
from planner.kernels.triton.project_columns import project_columns
from planner.kernels.triton.project_rows import project_rows
from planner.kernels.triton.score_tokens import score_tokens

KERNELS: tuple[Kernel, ...] = (
    project_rows,
    project_columns,
    attend,
    join_splits,
    score_tokens,
    choose_tokens,
    gather_tokens,
)
_BY_OP = {kernel.computes: kernel for kernel in KERNELS}


def kernel_of(op: type[Op]) -> Kernel:
    """The kernel that computes an op."""
    return _BY_OP[op]
