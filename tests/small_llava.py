"""A random small LLaVA with tiny-llava's processor, as a folder that stock transformers loads."""

from planner.training.tiny_llava import (
    TinyLlavaConfig,
    build_model,
    build_processor,
    export,
    plain_model,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 4,
    "heads": 4,
    "vision_hidden_size": 32,
    "vision_intermediate_size": 64,
    "vision_layers": 2,
    "vision_heads": 2,
}


def write_small_llava(folder, **sizes):
    config = TinyLlavaConfig(output_dir="unused", **{**SIZES, **sizes})
    processor = build_processor()
    export(plain_model(build_model(config, processor)), processor, folder)
    return folder
