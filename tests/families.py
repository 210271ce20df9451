"""Tiny random models of thirteen image-text families, with inputs that fit them.

    family = FAMILIES["llava"]()
    family.model(**family.inputs(batch=2, seed=0))

Everything is seeded and in float32. Weights are drawn at a scale where every layer, head and
neuron matters to the logits (the stock initialisation, 0.02, makes tiny models nearly the
identity, and a test that compares two of those proves little).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from planner.models.running.kv_cache import cache_argument

__all__ = ["FAMILIES", "Family", "cached", "llava_of", "randomise"]

PAD, BOS, FIRST_WORD, LAST_WORD = 0, 1, 3, 119
IMAGE, IMAGE_START, IMAGE_END, VIDEO = 120, 121, 122, 123

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    # Without an end-of-sequence token generation runs its full length.
    "eos_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_channels": 3,
}

# Image arguments for (images, images per sample).
Pixels = Callable[[int, int, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: key in `FAMILIES`.
        model: random, seeded, float32, in evaluation mode.
        image_tokens: placeholder tokens of one image; 0 for a text-only model.
    """

    name: str
    model: PreTrainedModel
    image_tokens: int = 0
    pixels: Pixels | None = field(default=None, repr=False)
    token_kinds: str = ""

    def inputs(
        self,
        batch: int = 1,
        seed: int = 0,
        *,
        images: int = 1,
        before: Sequence[int] = (3,),
        after: Sequence[int] = (5,),
        padding_side: str = "left",
    ) -> dict[str, Tensor]:
        """Keyword arguments of ``model(...)`` and ``model.generate(...)``.

        Sample i has ``before[i % len(before)]`` words, `images` images and
        ``after[i % len(after)]`` words; shorter samples are padded on `padding_side`.
        """
        generator = torch.Generator().manual_seed(seed)

        def words(count: int) -> list[int]:
            return torch.randint(FIRST_WORD, LAST_WORD + 1, (count,), generator=generator).tolist()

        image = [IMAGE_START, *[IMAGE] * self.image_tokens, IMAGE_END] if self.image_tokens else []
        samples = [
            [BOS, *words(before[i % len(before)]), *image * images, *words(after[i % len(after)])]
            for i in range(batch)
        ]
        longest = max(map(len, samples))
        ids = torch.full((batch, longest), PAD)
        mask = torch.zeros(batch, longest, dtype=torch.long)
        for row, sample in enumerate(samples):
            start = longest - len(sample) if padding_side == "left" else 0
            ids[row, start : start + len(sample)] = torch.tensor(sample)
            mask[row, start : start + len(sample)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.pixels is not None and images:
            inputs |= self.pixels(batch * images, images, generator)
            if self.token_kinds == "prefix":
                # The whole prompt is prefix, attended to in both directions.
                inputs["token_type_ids"] = torch.zeros_like(ids)
            elif self.token_kinds:
                inputs[self.token_kinds] = (ids == IMAGE).long()
        return inputs


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Draw all weights at a scale where they matter; see above."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def _build(
    name: str,
    text: dict[str, Any],
    vision: dict[str, Any] | None = None,
    pixels: Pixels | None = None,
    image_tokens: int = 0,
    token_kinds: str = "",
    **options: Any,
) -> Family:
    model_type = options.pop("model_type", name)
    torch.manual_seed(0)
    if vision is None:
        config = AutoConfig.for_model(model_type, **(TEXT | text), **options)
        model = AutoModelForCausalLM.from_config(config)
    else:
        config = AutoConfig.for_model(
            model_type, text_config=TEXT | text, vision_config=VISION | vision, **options
        )
        model = AutoModelForImageTextToText.from_config(config)
    model = randomise(model.float(), seed=len(name))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return Family(name, model, image_tokens, pixels, token_kinds)


def _noise(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _plain(size: int) -> Pixels:
    """Square images, one per row."""
    return lambda images, _, generator: {
        "pixel_values": _noise(images, 3, size, size, generator=generator)
    }


def _sized(size: int) -> Pixels:
    """Square images, and their sizes."""
    return lambda images, _, generator: {
        "pixel_values": _noise(images, 3, size, size, generator=generator),
        "image_sizes": torch.full((images, 2), size),
    }


def _tiled(tile: int, tiles: int) -> Pixels:
    """A thumbnail and ``tiles * tiles`` tiles per image."""
    return lambda images, _, generator: {
        "pixel_values": _noise(images, 1 + tiles * tiles, 3, tile, tile, generator=generator),
        "image_sizes": torch.full((images, 2), tile * tiles),
    }


def _by_sample(size: int) -> Pixels:
    """Square images, grouped by sample."""
    return lambda images, each, generator: {
        "pixel_values": _noise(images // each, each, 3, size, size, generator=generator)
    }


def _flat_patches(patch: int, side: int) -> Pixels:
    """Flattened patches (two frames each) of ``side * side`` grids, and the grids."""
    return lambda images, _, generator: {
        "pixel_values": _noise(images * side * side, 3 * 2 * patch**2, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]] * images),
    }


CLIP = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8}
PLAIN_TOKENS = {"image_token_index": IMAGE}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}
QWEN_VISION = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
TOWER_ONLY = {"vision_use_head": False}
NO_KV_SHARING = {"num_key_value_heads": 4}


def llava_of(text: dict[str, Any]) -> Family:
    """A LLaVA with a decoder of any kind, by its model_type and what differs from `TEXT`."""
    return _build("llava", text, CLIP, _plain(32), 16, **PLAIN_TOKENS)


FAMILIES: dict[str, Callable[[], Family]] = {
    "llava": partial(llava_of, {"model_type": "llama"}),
    "llava_next": partial(
        _build,
        "llava_next",
        {"model_type": "mistral", "sliding_window": None},
        CLIP | {"patch_size": 16},
        _tiled(32, 2),
        # 4 of the thumbnail, 16 of the tiles, 4 line ends.
        24,
        image_grid_pinpoints=[[64, 64]],
        **PLAIN_TOKENS,
    ),
    "llava_onevision": partial(
        _build,
        "llava_onevision",
        {"model_type": "qwen2"},
        SIGLIP | TOWER_ONLY | {"patch_size": 16},
        _tiled(32, 2),
        24,
        image_grid_pinpoints=[[64, 64]],
        video_token_index=VIDEO,
        **PLAIN_TOKENS,
    ),
    "qwen2_5_vl": partial(
        _build,
        "qwen2_5_vl",
        {"rope_parameters": MROPE},
        QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
        _flat_patches(4, 8),
        16,
        "mm_token_type_ids",
        **QWEN_TOKENS,
    ),
    "qwen3_vl": partial(
        _build,
        "qwen3_vl",
        {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        QWEN_VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        _flat_patches(4, 8),
        16,
        "mm_token_type_ids",
        **QWEN_TOKENS,
    ),
    "internvl": partial(
        _build,
        "internvl",
        {"model_type": "qwen2"},
        {"image_size": [32, 32], "patch_size": [4, 4]},
        _plain(32),
        16,
        image_token_id=IMAGE,
    ),
    "smolvlm": partial(
        _build,
        "smolvlm",
        {"model_type": "llama"},
        {"image_size": 32, "patch_size": 4},
        _by_sample(32),
        16,
        image_token_id=IMAGE,
        scale_factor=2,
    ),
    "paligemma": partial(
        _build,
        "paligemma",
        {"model_type": "gemma", "num_key_value_heads": 1},
        SIGLIP | TOWER_ONLY,
        _plain(32),
        16,
        "prefix",
        projection_dim=64,
        hidden_size=64,
        **PLAIN_TOKENS,
    ),
    "gemma3": partial(
        _build,
        "gemma3",
        {
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
        },
        SIGLIP,
        _plain(32),
        16,
        "token_type_ids",
        image_token_index=IMAGE,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
        mm_tokens_per_image=16,
    ),
    "mistral3": partial(
        _build,
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", "image_size": 32, "patch_size": 4, "head_dim": 16},
        _sized(32),
        16,
        spatial_merge_size=2,
        **PLAIN_TOKENS,
    ),
    "idefics3": partial(
        _build,
        "idefics3",
        {"model_type": "llama"},
        {"image_size": 32, "patch_size": 4},
        _by_sample(32),
        16,
        image_token_id=IMAGE,
        scale_factor=2,
    ),
    # Phi-2 with SigLIP: attention and MLP in parallel, plain MLP, biases, partial rotary.
    "phi": partial(
        _build,
        "phi",
        {"model_type": "phi", "num_key_value_heads": 4},
        SIGLIP | TOWER_ONLY,
        _plain(32),
        16,
        model_type="llava",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **PLAIN_TOKENS,
    ),
    "qwen3": partial(_build, "qwen3", {"num_hidden_layers": 3}),
}


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """The argument by which a stock model is given its KV cache."""
    return {cache_argument(model.forward): cache}
