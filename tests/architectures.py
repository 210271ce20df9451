"""Architectures to lower from their default configs, and a small LLaVA whose sizes can be set."""

from dataclasses import dataclass

import torch
import transformers

__all__ = [
    "ARCHITECTURES",
    "PECULIAR",
    "SIZES",
    "TEXT_ONLY",
    "Architecture",
    "peculiar",
    "small_llava",
]


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


# A whole period of the layers of every one.
DEPTH = 6


def _shallow(config):
    """With few decoder layers: most are copies of the first, and capturing each takes its time."""
    text = config.get_text_config()
    text.num_hidden_layers = DEPTH
    if vars(text).get("layer_types"):
        text.layer_types = text.layer_types[:DEPTH]
    return config


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
    "llava_next": lambda: Architecture(
        _shallow(transformers.LlavaNextConfig()), DEPTH, 32, 11008, 1176
    ),
    "llava_onevision": lambda: Architecture(
        _shallow(transformers.LlavaOnevisionConfig()), DEPTH, 32, 22016, 1485
    ),
    "qwen2_5_vl": lambda: Architecture(
        _shallow(transformers.Qwen2_5_VLConfig()),
        DEPTH,
        8,
        29568,
        144,
        "3584 wide, the decoder 8192",
    ),
    "qwen3_vl": lambda: Architecture(
        _shallow(transformers.Qwen3VLConfig()), DEPTH, 32, 22016, 100, "3584 wide, the decoder 4096"
    ),
    "internvl": lambda: Architecture(
        _shallow(transformers.InternVLConfig()), DEPTH, 32, 22016, 256
    ),
    "smolvlm": lambda: Architecture(_shallow(transformers.SmolVLMConfig()), DEPTH, 32, 11008, 4),
    "paligemma": lambda: Architecture(
        _shallow(transformers.PaliGemmaConfig()), DEPTH, 1, 16384, 256
    ),
    # Its projector pools 14 x 14 patches to 16 x 16 tokens, which cannot be.
    "gemma3": lambda: Architecture(
        _shallow(transformers.Gemma3Config()),
        DEPTH,
        4,
        9216,
        196,
        "projector was not captured (RuntimeError",
    ),
    "mistral3": lambda: Architecture(
        _shallow(transformers.Mistral3Config()), DEPTH, 8, 32768, 3025
    ),
    "idefics3": lambda: Architecture(_shallow(transformers.Idefics3Config()), DEPTH, 32, 11008, 4),
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
    "phi3": lambda: Architecture(_shallow(transformers.Phi3Config()), DEPTH, 32, 8192),
    "opt": lambda: Architecture(transformers.OPTConfig(), 12, 12, 3072),
    "gpt_neox": lambda: Architecture(_shallow(transformers.GPTNeoXConfig()), DEPTH, 64, 24576),
    "mixtral": lambda: Architecture(_shallow(transformers.MixtralConfig()), DEPTH, 8, 0),
    "mamba": lambda: Architecture(_shallow(transformers.MambaConfig()), DEPTH, 0, 0),
}


def small_llava(
    layers=3, heads=4, groups=2, neurons=96, text_type="llama", vision_layers=2, **text
):
    """Config of a LLaVA with some vision layers, of which the image features skip the last."""
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
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 2,
    }
    return transformers.LlavaConfig(
        text_config=sizes | text, vision_config=vision, image_token_index=120
    )


SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
# Text models whose layers hide their heads: in one fused projection, one head after another or
# interleaved; behind capped logits, that no fused attention computes; in latent keys and values;
# behind a rotation by complex numbers; behind a gate. Name -> (config, KV groups).
PECULIAR = {
    "phi3": lambda: (transformers.Phi3Config(**SIZES), 2),
    "gpt_neox": lambda: (transformers.GPTNeoXConfig(**SIZES), 4),
    "opt": lambda: (
        transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
        4,
    ),
    "gemma2": lambda: (transformers.Gemma2Config(**SIZES), 2),
    "deepseek_v3": lambda: (
        transformers.DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 4, "head_dim": 8},
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=2,
            kv_lora_rank=24,
            q_lora_rank=40,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
        ),
        4,
    ),
    "llama4": lambda: (
        transformers.Llama4TextConfig(
            **SIZES, intermediate_size_mlp=96, num_local_experts=2, moe_layers=[]
        ),
        2,
    ),
    "qwen3_next": lambda: (
        transformers.Qwen3NextConfig(
            **SIZES,
            layer_types=["full_attention", "full_attention"],
            num_experts=0,
            mlp_only_layers=[0, 1],
        ),
        2,
    ),
}


def peculiar(name):
    """A random model of `PECULIAR` in which every head matters, and its number of KV groups."""
    config, groups = PECULIAR[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model, groups
