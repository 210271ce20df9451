"""Learning: from rendered scenes or LLaVA data to a trained model, and its measured accuracy.

Enters: images with questions and answers (`data/`), a YAML configuration (`configs/`). Leaves: a
model folder that stock transformers loads. May import every other part of planner except the CLI.

    data/                 pictures with questions and answers
    configs/              what `planner train` takes
    requirements          what training takes besides planner itself
    recipes               what can be trained, by a configuration's `recipe`
    config                configurations: read, checked, changed by `key=value`
    tiny_llava            the recipe of the small model
    adallava              the recipe of a scheduler together with its model
    sparsification        the recipe of Dynamic-LLaVA's predictors together with their model
    fine_tuning           the recipe of a LLaVA with fewer image tokens
    joined_llava          the recipe of a LLaVA joined from a text model and a vision tower
    projector_alignment   a new projector that begins with words
    unified               the recipe of a controller over tokens, heads and layers
    conversation_runs     what these have in common
    token_draws           image tokens drawn for training, as switches are
    policy                a scheduler as a policy, which tries plans
    policy_methods        how a policy learns from what it tried
    memory_estimate       what a training step takes of a card
    warm_start            a scheduler taught by labels first
    run_folders           folders of a run: checked, kept with its settings, written whole
    trainer               transformers' Trainer, for runs that stop and go on
    estimators            switches drawn from logits, with a gradient
    sequential_draws      switches drawn one by one, and how likely an order is
    subset_distributions  exact distributions over subsets that fill a limit
    switch_costs          what switches cost, given those that are on
    gradient_check        estimators' gradients against exact ones
    labelling             what switches are worth to each sample, measured
    question_samples      the questions that labels are about, by name
    evaluate              accuracy per question family, and under budgets
    experiments/          tables of results, trained and measured
"""
