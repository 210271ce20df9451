"""Loading what `planner run` and `planner bench` run: weights, processor, images."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from planner.contained import contained
from planner.documents import read_json
from planner.files import MEBIBYTE, read_bytes
from planner.ir.errors import InputError, PlannerError, first_line
from planner.planning.catalog import OWN_TYPES, Source, find_model, make_known

_MOST_BYTES = 256 * MEBIBYTE
# Larger pictures are refused rather than decoded: a few hundred megapixels fill the memory.
MOST_PIXELS = 100_000_000
# What models see has a few megapixels at most; more would only fill memory on the way there.
_SEEN_PIXELS = 16_000_000
# Processors give the shorter side the length that a model wants, and the other one in proportion.
_MOST_ELONGATED = 200
# Prompts whose texts are kept for each processor.
_MOST_TEXTS = 10_000
# No format that runs a program, such as EPS.
_FORMATS = frozenset(
    ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
)


def load_model(
    name: str, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Any, Any, Source]:
    """(model in evaluation mode, processor, source) of an alias, a local folder or a hub id.

    `dtype` is ``auto`` for what the checkpoint has (float32 on a CPU), or a torch dtype's name.
    InputError where there are no weights; weights that are missing, unexpected, of another shape or
    not finite are named.
    """
    from transformers import AutoProcessor

    source = find_model(name, trust_remote_code)
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    model = _loaded(source, dtype)
    where = str(source.folder or source.hub_id)
    with _one_sentence(name):
        processor = AutoProcessor.from_pretrained(where, trust_remote_code=trust_remote_code)
    return _placed(model, device), processor, source


def load_weights(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """A model in evaluation mode, in the precision of its file, as `load_model`; adapters (peft) on
    their base."""
    adapters = folder / "adapter_config.json"
    if not adapters.exists() or (folder / "config.json").exists():
        return _placed(_loaded(find_model(str(folder), trust_remote_code), "auto"), device)
    base = read_json(adapters, "adapters' config")
    name = base.get("base_model_name_or_path") if isinstance(base, dict) else None
    if not isinstance(name, str):
        raise InputError(f"the adapters in '{folder}' do not name their base model")
    model = _loaded(find_model(name, trust_remote_code), "auto")
    with _one_sentence(str(folder)):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    return _placed(model, device)


def _loaded(source: Source, dtype: str) -> Any:
    """The model of a source with its weights, checked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    from transformers.utils import logging

    name = source.name
    if source.folder is None and source.hub_id is None:
        raise InputError(f"'{name}' has no weights here: give a local folder with weights")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"unknown dtype '{dtype}': choose auto, float32, bfloat16 or float16")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    logging.disable_progress_bar()
    make_known(source.config)
    seeing = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *OWN_TYPES}
    image_text = source.config["model_type"] in seeing
    auto = AutoModelForImageTextToText if image_text else AutoModelForCausalLM
    with _one_sentence(name):
        model, found = auto.from_pretrained(
            str(source.folder or source.hub_id),
            dtype=wanted,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=source.trust_remote_code,
        )
    _check_weights(model, found, name)
    return model


def _placed(model: Any, device: str) -> Any:
    """A model on a device, in evaluation mode."""
    import torch

    try:
        place = torch.device(device)
        if place.type == "meta":
            raise InputError("on 'meta' nothing runs: choose cpu or cuda")
        model = model.to(place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device '{device}': {first_line(error)}") from None
    return model.eval()


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Whatever libraries raise when they load a model becomes an InputError."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        raise InputError(f"the weights of '{name}' cannot be loaded: {reason}") from None


def _check_weights(model: Any, found: Mapping[str, Any], name: str) -> None:
    """Refuse a checkpoint whose tensors are not the model's, or are no numbers."""
    import torch

    for kind, said in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "have no place for"),
        ("mismatched_keys", "have another shape for"),
    ):
        keys = sorted(str(k[0] if isinstance(k, tuple) else k) for k in found.get(kind) or ())
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"the weights of '{name}' {said} {keys[0]}{more}")
    for path, weight in model.named_parameters():
        # Formats of 8 bits and fewer have no infinity, and no minimum either.
        if not weight.is_floating_point() or weight.itemsize < 2 or not weight.numel():
            continue
        if not all(torch.isfinite(end) for end in torch.aminmax(weight.detach())):
            raise InputError(f"the weights of '{name}' are not finite in {path}")


def load_image(path: Path) -> Any:
    """Read a picture from a file; see `decode_image`."""
    return decode_image(read_bytes(Path(path), "image", _MOST_BYTES), path)


def decode_image(contents: bytes, name: Path | str, most_pixels: int = MOST_PIXELS) -> Any:
    """The picture of an image file as RGB, the right way up, as transformers does.

    Pictures of more than 16 megapixels are made smaller. InputError where it is broken, has more
    than `most_pixels`, or holds what is no level of brightness.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(contents), formats=_known_formats()) as image:
                return _picture(image, name, most_pixels)
    except Image.DecompressionBombError:
        raise InputError(f"the image '{name}' has too many pixels") from None
    except InputError:
        raise
    # Decoders raise errors of all kinds.
    except Exception:
        raise InputError(f"the image '{name}' is broken or of an unknown format") from None


def image_pixels(contents: bytes) -> int:
    """How many pixels the picture of an image file says it has; 0 where it is no picture."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(contents), formats=_known_formats()) as image:
                return int(image.width * image.height)
    # Decoders raise errors of all kinds.
    except Exception:
        return 0


def _known_formats() -> list[str]:
    from PIL import Image

    Image.init()
    return sorted(_FORMATS & Image.OPEN.keys())


def _picture(image: Any, name: Path | str, most_pixels: int) -> Any:
    """An opened image as RGB, of no more pixels than are seen."""
    from PIL import Image, ImageOps

    width, height = image.size
    if width * height > most_pixels:
        raise InputError(
            f"the image '{name}' has {width} x {height} pixels, "
            f"more than {most_pixels / 1e6:g} million"
        )
    if max(width, height) > _MOST_ELONGATED * min(width, height):
        raise InputError(
            f"the image '{name}' has {width} x {height} pixels, and one side is more than "
            f"{_MOST_ELONGATED} times the other"
        )
    if width * height > _SEEN_PIXELS:
        share = math.sqrt(_SEEN_PIXELS / (width * height))
        smaller = (max(1, int(width * share)), max(1, int(height * share)))
        # A JPEG is decoded at a half, a quarter or an eighth of its size at once.
        image.draft(None, smaller)
        # Levels have to be known before some are averaged, or a colour map's numbers would be; and
        # what is see-through counts as it does in a small picture, for its colour.
        if image.mode in ("P", "1") or "A" in image.mode.upper():
            image = image.convert("RGB")
        image = image.resize(smaller, Image.Resampling.BOX)
    return _eight_bits(ImageOps.exif_transpose(image), name).convert("RGB")


def _eight_bits(image: Any, name: Path | str) -> Any:
    """The picture in levels from 0 to 255; Pillow by itself would cut off whatever is above."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    values = np.asarray(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"the image '{name}' holds pixels that are no finite numbers")
    low, high = float(values.min()), float(values.max())
    # Integers count from 0 to 255 or 65535; floating-point numbers run from 0 to 1, or to 255.
    most = 1.0 if image.mode == "F" and high <= 1 else 255.0 if high <= 255 else 65535.0
    if low < 0 or high > most or (image.mode == "F" and most > 255):
        raise InputError(
            f"the image '{name}' holds pixels from {low:g} to {high:g}, "
            "which are no levels of brightness"
        )
    return Image.fromarray((values * (255.0 / most)).astype(np.uint8))


def check_places(model: Any, tokens: int) -> None:
    """Raise InputError where a prompt with an answer has more tokens than a model knows places."""
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if places is not None and tokens > places:
        raise InputError(f"the model knows {places} places, which is less than {tokens} tokens")


def noise_image() -> Any:
    """A picture of noise, always the same: for measurements that no content should influence."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt_inputs(model: Any, processor: Any, prompt: str, *pictures: Any) -> dict[str, Any]:
    """Model inputs for one question about some images, which may be None.

    They go through the model's own chat template where it has one.
    """
    images = [picture for picture in pictures if picture is not None]
    content: Any = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": prompt})
    if not images and not hasattr(processor, "image_processor"):
        content = prompt
    text = prompt
    if getattr(processor, "chat_template", None):
        text = _templated(processor, content)
    elif images:
        tokens = getattr(processor, "image_token", "<image>") * len(images)
        text = f"USER: {tokens}\n{prompt} ASSISTANT:"
    arguments: dict[str, Any] = {"text": text, "return_tensors": "pt"}
    if images:
        arguments["images"] = images
    try:
        inputs = processor(**arguments)
    except Exception as error:
        raise InputError(f"the processor refuses the input: {first_line(error)}") from None
    return {name: value.to(model.device) for name, value in inputs.items()}


_texts: WeakKeyDictionary[Any, dict[tuple[str, str], str]] = WeakKeyDictionary()


def _templated(processor: Any, content: Any) -> str:
    """A question in the processor's chat template.

    Texts are kept, for a training that asks again and again: each takes a process of its own, and
    a process as large as a model is forked in a tenth of a second.
    """
    known = _texts.setdefault(processor, {})
    key = (str(processor.chat_template), str(content))
    if key not in known:
        messages = [{"role": "user", "content": content}]
        text = contained(
            lambda: processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            ),
            "the model's chat template",
        )
        if len(known) >= _MOST_TEXTS:
            known.clear()
        known[key] = text
    return known[key]


def refuse_nan(ids: Any, scores: Any) -> Any:
    """A logits processor that changes nothing: ``generate(logits_processor=[refuse_nan])``.

    PlannerError where the model computed NaN or infinity, of which no token could be chosen.
    """
    # Minus infinity is how other processors forbid a token.
    if (scores.isnan() | scores.isposinf()).any() or not scores.isfinite().any(-1).all():
        raise PlannerError("the model computed NaN or infinity instead of logits: no answer")
    return scores


def visual_tokens(config: Any, *kinds: str) -> tuple[int, ...]:
    """The tokens that stand for parts of images and videos in a model's prompts.

    `kinds`: ``image``, ``video``; both by default.
    """
    names = (
        f"{kind}_token_{end}" for kind in kinds or ("image", "video") for end in ("id", "index")
    )
    known = dict.fromkeys(getattr(config, name, None) for name in names)
    return tuple(token for token in known if isinstance(token, int))


def count_image_tokens(model: Any, inputs: dict[str, Any]) -> int:
    """Placeholders of images and videos in the first sample of a batch."""
    first = inputs["input_ids"][0]
    return sum(int((first == token).sum()) for token in visual_tokens(model.config))
