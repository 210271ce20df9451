"""Dynamic-LLaVA's predictors for tests: random ones that tell tokens apart, as a folder."""

import torch

from planner.models.tokens.predictors import Predictors, save_predictors
from planner.planning.selectors import PredictorSettings


def random_predictors(width, seed=0, **settings):
    """Small ones, in float64; weights are large, so that logits of tokens differ."""
    torch.manual_seed(seed)
    predictors = Predictors(width, PredictorSettings(**{"inner_width": 16, **settings})).double()
    with torch.no_grad():
        for parameter in predictors.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return predictors.eval()


def write_predictors(folder, width, seed=0, **settings):
    """The folder, with `random_predictors` in float32."""
    save_predictors(random_predictors(width, seed, **settings).float(), folder)
    return folder
