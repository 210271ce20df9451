"""Running: stock models made to obey plans, by skipping or by masks.

Imports `planner.ir`, `planner.plan`, `planner.kernels` and `planner.models.tokens`.

    session            a model's session: what is known of it, and which plans hold where
    planning           plans of one model, by budget and by prompt
    prompts            how large a prompt is
    encoders           what runs in front of the decoder, and what that costs
    saving             the plan beside the weights that `save_pretrained` writes
    program            a plan (or one per sample) as what every layer does
    skipping           passes that run a program, and nothing else
    traced             whether what torch.compile has traced is what its caller wants
    pass_lock          one pass at a time, in the order of asking
    ready              a program made ready for a model: what stands where while it runs
    refusals           what a model under a plan refuses
    layer_results      what a layer returns, and does where it is left out
    products           what linears, MLP blocks and attention compute with
    run_products       a product with features that are kept in several runs
    kernel_products    products by planner's kernels, on stock weights in place
    attention_calls    attention by planner's kernel, or seen: transformers' table of functions
    layers             what stands in for `forward` of layers and attention blocks
    forward_pass       one forward pass: rows, past, images, what is left
    kv_cache           KV caches that hold what is kept
    cache_layers       one layer of such a cache
    joined_cache       caches of several running answers as one, and taken apart
    growing_cache      a cache layer that appends in place
    attention_blocks   what else narrowing heads asks of an attention block
    bindings           sites of the Graph -> modules and feature layouts
    patches            instance attributes set for a while, and undone exactly
    masked             plans by masks: the oracle in tests, and what training differentiates
"""
