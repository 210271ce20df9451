"""Example inputs for capturing a model's parts: shapes, and the few values that models read.

Image models take pixels in a handful of forms (whole images, tiles, flattened patches with a grid).
Which one a model takes is read off its signature and config; where that leaves a choice, the
candidates are tried in order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from planner.ir.cost.workload import DEFAULT_TEXT_TOKENS
from planner.ir.lowering.describing import Markers

_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101)
_DEFAULT_IMAGE = 336
# Arguments of decoders: an encoder's output, which layers attend to beside the prompt.
ENCODED = ("encoder_hidden_states", "cross_attention_states")


def token_markers(module: nn.Module) -> Markers:
    """Token counts that can be told apart: the smallest primes that divide no weight's size.

    Every multiple of one in a captured shape is then a token count. Capturing at a marked length
    instead of with symbolic sizes keeps to one code path per model: none specialises or guards.
    """
    sizes = {int(s) for p in module.parameters() for s in p.shape}
    tokens, *others = (p for p in _PRIMES if not any(s % p == 0 for s in sizes))
    return Markers(tokens, next(p for p in others if tokens + p not in sizes))


def decoder_inputs(
    decoder: nn.Module, width: int, tokens: int, encoded: int
) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Candidate keyword arguments for a decoder, with the names of those that are activations.

    `encoded`: tokens of an encoder's output, where it attends to one.
    """
    hidden = torch.zeros(1, tokens, width, device="meta")
    accepted = inspect.signature(decoder.forward).parameters
    base: dict[str, Any] = {"inputs_embeds": hidden, "use_cache": False}
    # First: without them layers leave that attention out.
    for name in ENCODED:
        for features in _widths(decoder, width) if name in accepted else ():
            states = torch.zeros(1, encoded, features, device="meta")
            if "cross_attention_mask" in accepted:
                # As processors give it: without one Mllama reads no more keys than there are words.
                masks = {
                    "cross_attention_mask": torch.zeros(1, 1, tokens, encoded, device="meta"),
                    "full_text_row_masked_out_mask": torch.ones(1, 1, tokens, 1, device="meta"),
                }
                yield {**base, **masks, name: states}, ("inputs_embeds", name)
            yield {**base, name: states}, ("inputs_embeds", name)
    yield base, ("inputs_embeds",)
    if "decoder_inputs_embeds" in accepted:
        states = torch.zeros(1, encoded, width, device="meta")
        inputs = {"decoder_inputs_embeds": hidden, "inputs_embeds": states, "use_cache": False}
        yield inputs, ("inputs_embeds", "decoder_inputs_embeds")
    positions = torch.arange(tokens).expand(3, 1, tokens)
    if "position_ids" in accepted:
        yield {**base, "position_ids": positions}, ("inputs_embeds",)
        yield {**base, "position_ids": positions[0]}, ("inputs_embeds",)
    if "image_encoder_embeddings" in accepted:
        config: Any = decoder.config
        images = torch.zeros(1, 1, encoded, int(config.vision_config.embed_dim), device="meta")
        mask = torch.ones(1, tokens, 1, device="meta")
        extra = {"image_encoder_embeddings": images, "image_attention_mask": mask}
        yield {**base, **extra}, ("inputs_embeds", "image_encoder_embeddings")


def _widths(decoder: nn.Module, width: int) -> Iterable[int]:
    """How wide an encoder's output may be: as the decoder's state, or what a linear takes."""
    linears = (module for module in decoder.modules() if isinstance(module, nn.Linear))
    return dict.fromkeys([width, *(linear.in_features for linear in linears)])


def _first(config: Any, *names: str, default: Any = None) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, dict):
        return int(value.get("height", _DEFAULT_IMAGE)), int(value.get("width", _DEFAULT_IMAGE))
    first, *rest = value
    return int(first), int(rest[0] if rest else first)


def vision_inputs(config: Any, function: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Candidate keyword arguments for a function from pixels to image features, by the encoder's
    config."""
    accepted = inspect.signature(function).parameters
    channels = int(_first(config, "num_channels", "in_channels", "in_chans", default=3))
    patch = _pair(_first(config, "patch_size", default=14))[0]
    height, width = _pair(_first(config, "image_size", default=_DEFAULT_IMAGE))
    if not isinstance(getattr(config, "image_size", None), int) and height > 1024:
        height = width = _DEFAULT_IMAGE
    fixed: dict[str, Any] = {}
    if "interpolate_pos_encoding" in accepted:
        fixed["interpolate_pos_encoding"] = False
    zeros = partial(torch.zeros, device="meta")
    for words in [n for n in accepted if n.endswith("_input_ids") and "decoder" not in n]:
        # The question, where the projector reads it too.
        fixed[words] = zeros(1, DEFAULT_TEXT_TOKENS, dtype=torch.long)
    name = "pixel_values" if "pixel_values" in accepted else next(iter(accepted), "pixel_values")
    grids = [n for n in ("image_grid_thw", "grid_thw", "image_grid_hw") if n in accepted]
    if grids:
        merge = int(_first(config, "spatial_merge_size", "merge_size", default=2) or 2)
        frames = int(_first(config, "temporal_patch_size", default=1))
        rows = columns = max(merge, round(min(height, 448) / patch / merge / 2) * merge * 2)
        for grid_values in ([[1, rows, columns]], [[rows, columns]]):
            grid = {grids[0]: torch.tensor(grid_values)}
            cells = rows * columns
            for depth in dict.fromkeys((frames, 1, 2)):
                flat = zeros(cells, channels * depth * patch * patch)
                yield {name: flat, **grid}
            yield {name: zeros(cells, channels, patch, patch), **grid}
    image = zeros(1, channels, height, width)
    if "spatial_shapes" in accepted:
        rows, columns = height // patch, width // patch
        if not isinstance(getattr(config, "image_size", None), int):
            rows = columns = int(_first(config, "num_patches", default=256) ** 0.5)
        yield {
            name: zeros(1, rows * columns, channels * patch * patch),
            "spatial_shapes": torch.tensor([[rows, columns]]),
            "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.long),
        }
    if "aspect_ratio_ids" in accepted:
        tiles = int(_first(config, "max_num_tiles", default=4))
        yield {
            name: zeros(1, 1, tiles, channels, height, width),
            "aspect_ratio_ids": zeros(1, 1, dtype=torch.long),
            "aspect_ratio_mask": zeros(1, 1, tiles, dtype=torch.long),
        }
    if "image_sizes" in accepted:
        sizes = torch.tensor([[height, width]])
        yield {name: image, "image_sizes": sizes}
        for tiles in (3, 2, 5, 1, 4):
            yield {name: image.expand(1, tiles, -1, -1, -1), "image_sizes": sizes}
    yield {name: image, **fixed}
    yield {name: image[None], **fixed}
    rows, columns = height // patch, width // patch
    if rows % 4 or columns % 4:
        # Projectors that fold squares of patches need whole squares.
        size = (1, 1, channels, max(4, rows // 4 * 4) * patch, max(4, columns // 4 * 4) * patch)
        yield {name: zeros(size), **fixed}
    flat = zeros(1, rows * columns, channels * patch * patch)
    if name == "flattened_patches":
        # The row and column of each come first.
        features = _first(config, "patch_embed_hidden_size", default=channels * patch * patch)
        yield {name: zeros(1, rows * columns, 2 + int(features))}
    where = torch.stack(
        torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1
    )
    if "image_position_ids" in accepted:
        yield {name: flat, "image_position_ids": where.reshape(1, -1, 2)}
    yield {name: flat}
