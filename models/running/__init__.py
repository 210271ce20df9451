"""Running: stock models made to obey plans, by skipping or by masks.

Imports `planner.ir`, `planner.plan`, `planner.kernels` and `planner.models.tokens`.

    bindings           sites of the Graph -> modules and feature layouts
    narrowed_linear    linears that compute with some of their features
    lane_order         in which order kept lanes lie
    patches            instance attributes set for a while, and undone exactly
    attention_blocks   what else narrowing heads asks of an attention block
    program            a plan (or one per sample) as what every layer does
    kv_cache           KV caches that hold what is kept
    growing_cache      a cache layer that appends in place
    recording          seeing queries and keys
    call               one forward pass: rows, past, images, what is left
    forward_pass       forward passes begun and ended
    layers             what stands in for `forward` of layers and attention blocks
    executor           all of it on a model, and off again
    masked             the same plans by masks: the oracle in tests, and what training
        differentiates
"""
