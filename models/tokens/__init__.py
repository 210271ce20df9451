"""Tokens: which image tokens go on, and how a layer's arguments shrink with them.

In: token stages of a plan, and what a stock model computes. Out: a batch of the tokens that stay.

    selectors/      rules that pick image tokens
    predictors      Dynamic-LLaVA's trained predictors
    kept_tokens     what is left of a batch, and arguments narrowed to it
    answer_cache    caches that store some tokens of an answer
    answer_stage    which tokens of an answer are worth keeping
    summed_up       VoCo tokens, which stand for an image
    token_stages    stages carried out: images found, selectors run
    text_tower      questions and patches in CLIP's joint space
    vision_stage    selectors between vision tower and projector
    tower_stage     selectors inside the vision tower
"""
