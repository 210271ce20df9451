"""Dynamic-LLaVA's predictors for tests: random ones that tell tokens apart, as a folder."""

import torch

from planner.models.tokens.predictors import Predictors, save_predictors
from planner.planning.selectors import PredictorSettings


def random_predictors(width, seed=0, **settings):
    """Small ones, in float64, that keep about half of what they see, if that is white noise."""
    torch.manual_seed(seed)
    predictors = Predictors(width, PredictorSettings(**{"inner_width": 16, **settings})).double()
    with torch.no_grad():
        for parameter in predictors.parameters():
            spread = 2 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
        noise = torch.randn(1, 256, width, dtype=torch.float64)
        valid = torch.ones(1, 256, dtype=torch.bool)
        for kind, seen in ((predictors.image, (noise, valid)), (predictors.output, (noise,))):
            if kind is not None:
                kind.output_mlp[-1].bias -= kind(*seen).flatten(0, 1).median(0).values
    return predictors.eval()


def write_predictors(folder, width, seed=0, **settings):
    """The folder, with `random_predictors` in float32."""
    save_predictors(random_predictors(width, seed, **settings).float(), folder)
    return folder
