"""The Triton kernels: one file each, and what they share.

Enters: activations, stock weights, and survivors as index tensors. Leaves: what the op of the same
name returns. A kernel's file holds an object of class `Kernel` (`kernel.py`): its Triton function,
launcher, cost and test cases. May import `planner.ir`, and of `planner.kernels` survivors and the
ops' definitions; the ops import a kernel only when they run it, since Triton is not everywhere.

    kernel.py         what a kernel is
    launch.py         starting one: compiled, interpreted, or recorded; counting; generated kernels
    interpreter.py    a kernel on the CPU, with every access checked
    tiles.py          GPUs, tile sizes and predicted times
    primitives.py     device functions that several kernels share
    project_rows.py, project_columns.py                     products with narrowed weights
    attend.py, join_splits.py                               attention
    score_tokens.py, choose_tokens.py, gather_tokens.py     token stages
    registry.py       all kernels, a line each
"""
