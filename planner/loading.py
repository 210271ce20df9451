"""Loading what `planner run` and `planner bench` run: weights, processor, images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from planner.ir.errors import InputError
from planner.planning.catalog import HUB, Source, find_model

__all__ = ["count_image_tokens", "load_image", "load_model", "noise_image", "prompt_inputs"]

# Larger pictures are refused rather than decoded: a few hundred megapixels fill the memory.
MOST_PIXELS = 100_000_000


def load_model(
    name: str, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Any, Any, Source]:
    """(model in evaluation mode, processor, source) of a model with weights.

    Args:
        name: alias, local folder or hub id.
        dtype: ``auto`` for what the checkpoint has (float32 on a CPU), or a torch dtype's name.
        device: a torch device.

    Raises:
        InputError: one sentence; no weights is the usual one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    source = find_model(name, trust_remote_code)
    where = str(source.folder or source.hub_id or HUB.get(name, name))
    if source.folder is None and source.hub_id is None and name not in HUB:
        raise InputError(f"'{name}' has no weights here: give a local folder with weights")
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"unknown dtype '{dtype}': choose auto, float32, bfloat16 or float16")
    options = {"trust_remote_code": trust_remote_code}
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    logging.disable_progress_bar()
    image_text = source.config["model_type"] in _image_text_types()
    auto = AutoModelForImageTextToText if image_text else AutoModelForCausalLM
    try:
        model = auto.from_pretrained(where, dtype=wanted, **options)
        processor = AutoProcessor.from_pretrained(where, **options)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise InputError(f"the weights of '{name}' cannot be loaded: {reason}") from None
    try:
        model = model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device '{device}': {str(error).splitlines()[0]}") from None
    return model.eval(), processor, source


def _image_text_types() -> set[str]:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    return set(NAMES)


def load_image(path: Path) -> Any:
    """Read a picture as RGB, the right way up, as transformers does.

    Raises:
        InputError: it is missing, broken, far too large, or holds what is no number.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                if width * height > MOST_PIXELS:
                    raise InputError(
                        f"the image '{path}' has {width} x {height} pixels, "
                        f"more than {MOST_PIXELS // 10**6} million"
                    )
                return _eight_bits(ImageOps.exif_transpose(image), path).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"there is no image '{path}'") from None
    except Image.DecompressionBombError:
        raise InputError(f"the image '{path}' has too many pixels") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise InputError(f"the image '{path}' is broken or of an unknown format") from None


def _eight_bits(image: Any, path: Path) -> Any:
    """The picture in levels from 0 to 255; Pillow by itself would cut off whatever is above."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise InputError(f"the image '{path}' holds pixels that are no finite numbers")
    return image


def noise_image(size: int = 336) -> Any:
    """A picture of noise, always the same: for measurements that no content should influence."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt_inputs(model: Any, processor: Any, prompt: str, image: Any | None) -> dict[str, Any]:
    """Model inputs for one question, through the model's own chat template where it has one."""
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    if image is not None:
        content.insert(0, {"type": "image"})
    text = prompt
    if getattr(processor, "chat_template", None):
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    elif image is not None:
        token = getattr(processor, "image_token", "<image>")
        text = f"USER: {token}\n{prompt} ASSISTANT:"
    arguments = {"text": text, "return_tensors": "pt"}
    if image is not None:
        arguments["images"] = image
    try:
        inputs = processor(**arguments)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise InputError(
            f"the processor refuses the input: {lines[0] if lines else type(error).__name__}"
        ) from None
    return {name: value.to(model.device) for name, value in inputs.items()}


def count_image_tokens(model: Any, inputs: dict[str, Any]) -> int:
    """Placeholders of images in the first sample of a batch."""
    for name in ("image_token_id", "image_token_index"):
        token = getattr(model.config, name, None)
        if isinstance(token, int):
            return int((inputs["input_ids"][0] == token).sum())
    return 0
