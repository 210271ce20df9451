"""Which architectures are checked: all image-text ones of transformers, and some of text alone."""

from __future__ import annotations

# Chosen to differ: layers that return tuples; fused, transposed and latent projections; one KV
# head; experts; state spaces and linear attention beside attention; keys shared by layers.
TEXT_TYPES = (
    "bamba",
    "biogpt",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "exaone4",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoehybrid",
    "lfm2",
    "llama",
    "mamba",
    "mamba2",
    "minimax",
    "mistral",
    "mixtral",
    "mpt",
    "nemotron",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "qwen3_next",
    "smollm3",
    "stablelm",
    "starcoder2",
)


def image_text_types() -> tuple[str, ...]:
    """What transformers maps to models of images and text, in its order."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    return tuple(NAMES)
