"""Dynamic-LLaVA's predictors: which image tokens, and which tokens of an answer, are worth keeping.

Huang et al., "Dynamic-LLaVA" (arXiv 2412.00876), appendix A.4.1, with the names and shapes of the
released code. Keep is the first of two logits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from planner.files import MEBIBYTE, output_folder, read_bytes, write_bytes, write_text
from planner.ir.errors import InputError
from planner.planning.selectors import PredictorSettings
from planner.planning.selectors.trained_predictors import BLOCKS, SETTINGS, WEIGHTS

# Standard deviation of untrained linear weights, and the decoder's width that it was chosen for.
_SPREAD = 0.02
_PUBLISHED_WIDTH = 4096
_MOST_BYTES = 1024 * MEBIBYTE


class _Attention(nn.Module):
    """Attention of image tokens to those of their sample; q, k and v without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        qkv = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        query, key, value = qkv.unbind(2)
        mixed = scaled_dot_product_attention(query, key, value, valid[:, None, None, :])
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(hidden)))
        return out


class _Block(nn.Module):
    """A transformer block that normalises before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _MLP(width)

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), valid)
        out: Tensor = hidden + self.mlp(self.norm2(hidden))
        return out


def _scorer(settings: PredictorSettings) -> list[nn.Module]:
    """Linears from inner features to two logits, GELU between them."""
    layers: list[nn.Module] = []
    for out, into in settings.scorer():
        layers += [nn.Linear(into, out), nn.GELU()]
    return layers[:-1]


class ImagePredictor(nn.Module):
    """Logits of image tokens, all of a sample seen together."""

    def __init__(self, width: int, settings: PredictorSettings) -> None:
        super().__init__()
        inner = settings.inner_width
        self.down_mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU())
        blocks = [_Block(inner, settings.heads) for _ in range(BLOCKS)]
        self.transformer = nn.ModuleList(blocks)
        self.output_mlp = nn.Sequential(*_scorer(settings))

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """Shape (batch, n, 2) for hidden states (batch, n, width).

        `valid`, shape (batch, n), bool, is False for padding, which changes nothing.
        """
        # A sample without any token must not become NaN.
        seen = valid | ~valid.any(1, keepdim=True)
        features = self.down_mlp(hidden) * seen[..., None]
        for block in self.transformer:
            features = block(features, seen)
        own, shared = features.chunk(2, -1)
        weights = seen[..., None].to(features.dtype)
        mean = (shared * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        logits: Tensor = self.output_mlp(torch.cat([own, mean.expand_as(own)], -1))
        return logits


class OutputPredictor(nn.Module):
    """Logits of answer tokens, each seen alone."""

    def __init__(self, width: int, settings: PredictorSettings) -> None:
        super().__init__()
        inner = settings.inner_width
        first = nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU()
        self.output_mlp = nn.Sequential(*first, *_scorer(settings))

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape (..., 2) for hidden states (..., width)."""
        logits: Tensor = self.output_mlp(hidden)
        return logits


class Predictors(nn.Module):
    """Both predictors, or one of them, beside a decoder of a width.

    Untrained: linear weights of N(0, 0.02), biases 0. Where a predictor is narrower than published,
    weights are wider in proportion: of equally small ones logits would hardly depend on tokens.
    """

    def __init__(self, width: int, settings: PredictorSettings | None = None) -> None:
        super().__init__()
        self.width = width
        self.settings = settings = settings or PredictorSettings()
        self.image = ImagePredictor(width, settings) if settings.use_vision_predictor else None
        self.output = (
            OutputPredictor(width, settings) if settings.use_output_text_predictor else None
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                self._initialise(module)

    def _initialise(self, linear: nn.Linear) -> None:
        published = PredictorSettings()
        narrower = published.inner_width / self.settings.inner_width
        if linear.in_features == self.width:
            narrower = _PUBLISHED_WIDTH / self.width
        nn.init.normal_(linear.weight, std=_SPREAD * max(1, narrower) ** 0.5)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def save_predictors(predictors: Predictors, folder: str | Path) -> None:
    """Write predictors into a folder, each file whole or not at all."""
    folder = output_folder(Path(folder))
    weights = {name: value.contiguous().cpu() for name, value in predictors.state_dict().items()}
    write_bytes(folder / WEIGHTS, save(weights, {"format": "pt"}))
    write_text(folder / SETTINGS, predictors.settings.model_dump_json(indent=1) + "\n")


def load_predictors(folder: str | Path, width: int) -> Predictors:
    """Read predictors for a decoder of a width, in the type of their file.

    Raises InputError: the folder holds none, they are broken, or they are for another width.
    """
    folder, settings = Path(folder), PredictorSettings.read(folder)
    try:
        weights = load(read_bytes(folder / WEIGHTS, "predictors", _MOST_BYTES))
    except (ValueError, SafetensorError) as error:
        raise InputError(f"the predictors in '{folder}' are broken: {error}") from None
    with torch.device("meta"):
        predictors = Predictors(width, settings)
    shapes = {name: value.shape for name, value in predictors.state_dict().items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise InputError(
            f"the predictors in '{folder}' are not for a decoder {width} features wide, or not "
            f"those that its {SETTINGS} says"
        )
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise InputError(f"the predictors in '{folder}' are broken: weights are not finite")
    predictors.load_state_dict(weights, assign=True)
    return predictors.requires_grad_(False).eval()
