"""What the kernels compute: one file an op, with everything about it but the Triton kernel.

Enters: activations, stock weights read in place, and the units of a site that survive. Leaves: what
stock code would have computed of them. Each op is told whether Triton computes it (interpreted on
CPU tensors) or PyTorch; `planner.kernels.choice` says who should. May import `planner.ir`,
survivors, and the kernels where they are run.

    op               what an op is, and how PyTorch gets to know it
    kept_linear      a product with all features
    product_probe    which library multiplies fastest on this CPU
    project_rows     surviving output features: queries, keys, values, an MLP's neurons
    project_columns  a linear over surviving input features: output and down projections
    attend           attention of surviving heads, in stock layouts
    score_tokens, choose_tokens, gather_tokens   token stages
"""
