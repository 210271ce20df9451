"""Projectors that give the decoder fewer image tokens, on a stock LLaVA.

In: a stock LLaVA and a projector's name, ``token-packer:2``. Out: the same model with that
projector, untrained: trained, planned, lowered and priced as any other.

    projected_llava  the projectors by name, and LLaVA with one of them
    projector        what a projector is
    token_packer     TokenPacker: each token attends to its own square of patches
    c_abstractor     Honeybee's C-Abstractor: convolutions around a mean over squares
    resampler        Honeybee's Resampler: six layers of queries that attend to patches
    qwen_resampler   Qwen-VL's: one layer of them, with sines and cosines of places
    pixel_shuffle    InternVL's: squares of patches side by side
    ldp              MobileVLM's LDP-v2: a mean over squares, and a convolution
"""

from planner.models.projectors.projected_llava import (
    ProjectedLlavaConfig,
    ProjectedLlavaForConditionalGeneration,
    fitted_processor,
    projected_config,
    projected_source,
    with_projector,
)

__all__ = [
    "ProjectedLlavaConfig",
    "ProjectedLlavaForConditionalGeneration",
    "fitted_processor",
    "projected_config",
    "projected_source",
    "with_projector",
]
