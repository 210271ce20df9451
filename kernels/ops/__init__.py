"""What the kernels compute: one file an op, with everything about it but the Triton kernel.

Enters: activations, stock weights read in place, and the units of a site that survive. Leaves: what
stock code would have computed of them. Survivors are tensors, so another plan or budget neither
recompiles nor breaks a graph, and samples of one batch may carry different plans. Each op is told
whether Triton computes it (interpreted on CPU tensors) or PyTorch; `planner.kernels.choice` says
who should. May import `planner.ir`, survivors, and the kernels where they are run.

    op.py               what an op is, and how PyTorch gets to know it
    slices.py           how PyTorch reads survivors
    kept_linear.py      a product with all features
    project_rows.py     surviving output features: queries, keys, values, an MLP's neurons
    project_columns.py  a linear over surviving input features: output and down projections
    mlp.py              an MLP of these two
    attend.py           attention of surviving heads, in stock layouts
    score_tokens.py, choose_tokens.py, gather_tokens.py     token stages
"""
