"""Stock models made to obey plans.

In: a stock transformers model, its Graph, Plans. Out: the same model, running what the plans keep
and nothing else. Imports `planner.ir` and `planner.plan`; nothing in here knows an architecture.

    running/      sites bound to modules, execution by skipping and by masks, KV caches
    tokens/       token stages, and the selectors that pick image tokens
    scheduling/   schedulers: a plan for every input
    checking/     what planner does with an architecture, tried on a small model of it
    calibration/  utilities measured on a user's inputs
    profiling/    seconds measured on the user's machine
    recovery/     weights that make up for what a plan removes; utilities by default
    export/       narrowed checkpoints
    projectors/   fewer image tokens by another projector on a stock LLaVA
    conversion/   checkpoints in their authors' layouts, made stock ones
    tiny_llava/   the small model that ships with planner
    deep_llava/   its deeper sister, for schedulers to choose from
    smol_llava/   SmolLM2 that sees what they see, as changes to its weights
"""
