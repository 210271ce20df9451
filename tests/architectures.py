"""Architectures to lower from their default configs, and a small LLaVA whose sizes can be set."""

from dataclasses import dataclass

import transformers

__all__ = ["ARCHITECTURES", "TEXT_ONLY", "Architecture", "small_llava"]


@dataclass(frozen=True)
class Architecture:
    """A config, and what must be found in its model.

    `groups` counts the KV groups of a layer, `neurons` the width of its MLP (0: no such site);
    `image_tokens` the features of one run of the vision side. `at_odds` is part of the note that
    says how a default config disagrees with itself.
    """

    config: object
    layers: int
    groups: int
    neurons: int
    image_tokens: int = 0
    at_odds: str = ""


def _llava(text=None, vision=None, **options):
    return transformers.LlavaConfig(text_config=text, vision_config=vision, **options)


ARCHITECTURES = {
    "llava-1.5-7b": lambda: Architecture(_llava(), 32, 32, 11008, 576),
    "llava-1.5-13b": lambda: Architecture(
        _llava(
            transformers.LlamaConfig(
                hidden_size=5120,
                intermediate_size=13824,
                num_hidden_layers=40,
                num_attention_heads=40,
            )
        ),
        40,
        40,
        13824,
        576,
    ),
    # A base image and two tiles, line ends among them.
    "llava_next": lambda: Architecture(transformers.LlavaNextConfig(), 32, 32, 11008, 1176),
    "llava_onevision": lambda: Architecture(
        transformers.LlavaOnevisionConfig(), 32, 32, 22016, 1485
    ),
    "qwen2_5_vl": lambda: Architecture(
        transformers.Qwen2_5_VLConfig(), 80, 8, 29568, 144, "3584 wide, the decoder 8192"
    ),
    "qwen3_vl": lambda: Architecture(
        transformers.Qwen3VLConfig(), 32, 32, 22016, 100, "3584 wide, the decoder 4096"
    ),
    "internvl": lambda: Architecture(transformers.InternVLConfig(), 32, 32, 22016, 256),
    "smolvlm": lambda: Architecture(transformers.SmolVLMConfig(), 32, 32, 11008, 4),
    "paligemma": lambda: Architecture(transformers.PaliGemmaConfig(), 18, 1, 16384, 256),
    # Its projector pools 14 x 14 patches to 16 x 16 tokens, which cannot be.
    "gemma3": lambda: Architecture(
        transformers.Gemma3Config(), 26, 4, 9216, 196, "projector was not captured (RuntimeError"
    ),
    "mistral3": lambda: Architecture(transformers.Mistral3Config(), 40, 8, 32768, 3025),
    "idefics3": lambda: Architecture(transformers.Idefics3Config(), 32, 32, 11008, 4),
    "phi-2 with siglip": lambda: Architecture(
        _llava(
            transformers.PhiConfig(
                hidden_size=2560,
                num_hidden_layers=32,
                num_attention_heads=32,
                intermediate_size=10240,
                partial_rotary_factor=0.4,
            ),
            transformers.SiglipVisionConfig(),
            vision_feature_select_strategy="full",
        ),
        32,
        32,
        10240,
        196,
    ),
}
TEXT_ONLY = {
    "llama": lambda: Architecture(transformers.LlamaConfig(), 32, 32, 11008),
    "qwen3": lambda: Architecture(transformers.Qwen3Config(), 32, 32, 22016),
    "phi3": lambda: Architecture(transformers.Phi3Config(), 32, 32, 8192),
    "opt": lambda: Architecture(transformers.OPTConfig(), 12, 12, 3072),
    "gpt_neox": lambda: Architecture(transformers.GPTNeoXConfig(), 44, 64, 24576),
    "mixtral": lambda: Architecture(transformers.MixtralConfig(), 32, 8, 0),
    "mamba": lambda: Architecture(transformers.MambaConfig(), 32, 0, 0),
}


def small_llava(layers=3, heads=4, groups=2, neurons=96, text_type="llama", **text):
    """Config of a LLaVA with two vision layers, of which the image features skip the last."""
    sizes = {
        "model_type": text_type,
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 16,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "clip_vision_model",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return transformers.LlavaConfig(
        text_config=sizes | text, vision_config=vision, image_token_index=120
    )
