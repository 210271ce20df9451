"""Tiny models with another number of KV groups, for schedulers to choose from."""

import functools

import torch
from families import FAMILIES, randomise

from planner.ir.lowering import lower_model


@functools.cache
def with_groups(name, groups=4):
    """(family, graph); a family with a single head stays as it is. Tests leave models unchanged."""
    family = FAMILIES[name]()
    family.model.config.get_text_config().num_key_value_heads = groups
    torch.manual_seed(0)
    model = randomise(type(family.model)(family.model.config).eval(), 0)
    return type(family)(**{**vars(family), "model": model}), lower_model(model, name)
