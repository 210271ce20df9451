"""Stock models made to obey plans.

In: a stock transformers model, its Graph, Plans. Out: the same model, running what the plans keep
and nothing else. Imports `planner.ir` and `planner.plan`; nothing in here knows an architecture.

    bindings   sites of the Graph -> modules and feature layouts
    slices     linears that compute with some of their features
    patches    instance attributes set for a while, and undone exactly
    attention  what else narrowing heads asks of an attention block
    program    a plan (or one per sample) as what every layer does
    tokens     which tokens go on, and how a layer's arguments shrink with them
    cache      KV caches that hold what is kept
    recording  seeing queries and keys
    vision     selectors between vision tower and projector
    calls      one forward pass: rows, past, images, what is left
    stages     token stages: images found, selectors run
    passes     forward passes begun and ended
    layers     what stands in for `forward` of layers and attention blocks
    executor   all of it on a model, and off again
    masked     the same plans by masks: the oracle in tests, and what training differentiates
    selectors/ rules that pick image tokens
    calibration/ utilities measured on a user's images
    export/    narrowed checkpoints
"""
