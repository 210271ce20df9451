"""Stock models made to obey plans.

In: a stock transformers model, its Graph, Plans. Out: the same model, running what the plans keep
and nothing else. Imports `planner.ir` and `planner.plan`; nothing in here knows an architecture.

    bindings   sites of the Graph -> modules and feature layouts
    slices     linears that compute with some of their features
    attention  what else narrowing heads asks of an attention block
    program    a plan (or one per sample) as what every layer does
    tokens     which tokens go on, and how a layer's arguments shrink with them
    cache      KV caches that hold what is kept
    calls      one forward pass: rows, past, images, token selectors
    layers     what stands in for `forward` of layers and attention blocks
    executor   all of it on a model, and off again
    masked     the same plans by masks: the oracle in tests, and what training differentiates
    calibration/ what switches are worth, measured on a few images
    export/    a plan's model as a checkpoint of its own
    selectors/ rules that pick image tokens
"""
