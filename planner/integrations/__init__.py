"""Planned models in other people's programs: one small file each, which that program calls.

Enters: how the program names a model, and `budget` with other options of `planner.compile`. Leaves:
the model as the program wants it. None of these programs is needed to use planner.

    harness_options     budget and options from an evaluation harness's --model_args
    lm_harness          lm-eval: texts' likelihoods and answers
    lmms_harness        lmms-eval: answers about pictures
    transformers_serve  transformers serve
"""
