"""The Triton kernels: one file each, and what they share.

A kernel's file holds an object of class `Kernel`: its Triton function, launcher, cost and test
cases. May import `planner.ir`, and of `planner.kernels` survivors and the ops' definitions; the ops
import a kernel only when they run it, since Triton is not everywhere.

    kernel       what a kernel is
    launch       starting one: compiled, interpreted, or recorded; counting; generated kernels
    interpreter  a kernel on the CPU, with every access checked
    tiles        GPUs, tile sizes and predicted times
    primitives   device functions that several kernels share
    registry     all kernels, a line each
    project_rows, project_columns                products with narrowed weights
    attend, join_splits                          attention
    score_tokens, choose_tokens, gather_tokens   token stages
"""
