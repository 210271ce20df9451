"""From a folder in an authors' layout to a stock one, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from planner.documents import validated
from planner.files import check_new, whole_folder
from planner.ir.errors import InputError
from planner.ir.lowering import lower_config
from planner.models.conversion.authors_config import AuthorsConfig
from planner.models.conversion.authors_weights import (
    PREDICTORS,
    SCHEDULER,
    STOCK,
    Shapes,
    authors_names,
    check,
    without_unused,
)
from planner.models.conversion.stock_processor import IMAGE, stock_processor
from planner.models.conversion.tensor_files import read_tensors
from planner.models.scheduling import Scheduler, save_scheduler
from planner.models.tokens.predictors import Predictors
from planner.planning.selectors import PredictorSettings
from planner.planning.selectors.trained_predictors import SETTINGS, WEIGHTS

_TOWER = "model.vision_tower."
# Stock LLaVA's vocabulary is a multiple of it, <image> and <pad> included: 32064 of 32000 words.
_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class Converted:
    """What was read and written."""

    folder: Path
    layout: str  # llava, adallava-l, adallava-h or dynamic-llava
    parameters: int  # of the stock model
    added: int  # of the scheduler, or the predictors, beside it
    selector: str  # of tokens, that the model was trained with; "" for none


def convert(
    source: Path, output: Path, vision_tower: Path | None = None, allow_pickle: bool = False
) -> Converted:
    """Read a checkpoint in its authors' layout, and write stock transformers' and planner's files.

    Args:
        source: folder of LLaVA-1.5, AdaLLaVA (L or H) or Dynamic-LLaVA, with its tokenizer.
        output: to be made; an empty one may be there.
        vision_tower: folder of the CLIP that the config names; it is needed where the checkpoint
            does not hold its weights, or it is none of OpenAI's large ones.
        allow_pickle: read tensors from ``.bin`` files where there are no safetensors.

    Raises InputError: the folder is in no such layout; keys that are missing, left over or of
    another shape are named, as the authors call them.
    """
    check_new(output)
    authors = AuthorsConfig.read(source)
    vision = authors.vision(vision_tower)
    config = authors.stock(vision)
    tower = authors.tower_name(vision_tower)
    pads = authors.values.get("image_aspect_ratio") == "pad"
    processor = stock_processor(source, config, tower, pads)
    with torch.device("meta"):
        stock = _shapes(LlavaForConditionalGeneration(config).state_dict())
    vocabulary = _add_words(config, processor.tokenizer)
    scheduler = _scheduler(authors, config, output.name)
    names = authors_names(STOCK, stock)
    added, added_shapes = _added(authors, config, scheduler)
    wanted = {names[name]: shape for name, shape in stock.items()}
    wanted |= {added[name]: shape for name, shape in added_shapes.items()}

    tensors = without_unused(read_tensors(source, allow_pickle))
    if not any(name.startswith(STOCK[_TOWER]) for name in tensors):
        tensors |= _tower_weights(tower, allow_pickle)
    check(tensors, wanted, source)

    state = {name: tensors[theirs] for name, theirs in names.items()}
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        state[name] = _padded(state[name], vocabulary)
    beside = {name: tensors[theirs].contiguous() for name, theirs in added.items()}
    config.dtype = state["lm_head.weight"].dtype
    config.architectures = ["LlavaForConditionalGeneration"]
    with whole_folder(output) as folder:
        save_torch_state_dict(state, folder, filename_pattern="model{suffix}.safetensors")
        config.save_pretrained(folder)
        _generation(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        if scheduler is not None:
            scheduler.load_state_dict(beside)
            save_scheduler(scheduler, folder)
        elif beside:
            save_file(beside, folder / WEIGHTS, metadata={"format": "pt"})
            settings = {"format": 1, **authors.values["sparse_config"]}
            (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    selector = authors.values.get("token_selecting")
    return Converted(
        output,
        authors.layout,
        sum(value.numel() for value in state.values()),
        sum(value.numel() for value in beside.values()),
        "" if selector in (None, "none") else str(selector),
    )


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def _add_words(config: LlavaConfig, tokenizer: Any) -> int:
    """Give the config the tokenizer's two new words; the size of the vocabulary with them."""
    text = config.text_config
    size: int = max(text.vocab_size, len(tokenizer))
    if size > text.vocab_size:
        size += -size % _VOCABULARY_MULTIPLE
    text.vocab_size = size
    text.pad_token_id = tokenizer.pad_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE)
    return size


def _padded(rows: Tensor, count: int) -> Tensor:
    """Rows of an embedding with more of them: their mean, whose logit is never the largest."""
    more = rows.float().mean(0, keepdim=True).to(rows.dtype).expand(count - len(rows), -1)
    return torch.cat([rows, more])


def _generation(config: LlavaConfig) -> GenerationConfig:
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


def _scheduler(authors: AuthorsConfig, config: LlavaConfig, name: str) -> Scheduler | None:
    """AdaLLaVA's scheduler without its weights, if the checkpoint has one."""
    if not authors.layout.startswith("adallava"):
        return None
    # A stray comma of the authors' makes the rank a list of one.
    rank = authors.values.get("scheduler_rank")
    rank = rank[0] if isinstance(rank, list) and len(rank) == 1 else rank
    options = {"first": authors.values.get("num_prefix_layers")}
    options |= {"unit": rank} if authors.layout == "adallava-h" else {}
    given = ",".join(f"{key}={value}" for key, value in options.items() if value is not None)
    switches = f"{authors.layout}:{given}" if given else authors.layout
    provenance = {"converted_from": authors.folder.name}
    try:
        return Scheduler.of(lower_config(config, name).graph, switches, provenance)
    except InputError as error:
        raise InputError(f"the config.json in '{authors.folder}': {error}") from None


def _added(
    authors: AuthorsConfig, config: LlavaConfig, scheduler: Scheduler | None
) -> tuple[dict[str, str], Shapes]:
    """All that is beside the stock model: planner's names -> the authors', and -> shapes."""
    if scheduler is not None:
        shapes = _shapes(scheduler.state_dict())
        return authors_names(SCHEDULER, shapes), shapes
    sparse = authors.values.get("sparse_config")
    if not isinstance(sparse, dict):
        return {}, {}
    settings = validated(PredictorSettings, sparse, f"sparse_config of '{authors.folder}'")
    with torch.device("meta"):
        shapes = _shapes(Predictors(config.text_config.hidden_size, settings).state_dict())
    return authors_names(PREDICTORS, shapes), shapes


def _tower_weights(tower: str, allow_pickle: bool) -> dict[str, Tensor]:
    """A vision tower's weights by the names that they have inside the authors' checkpoints."""
    folder = Path(tower)
    if not folder.is_dir():
        raise InputError(
            f"the checkpoint does not hold its vision tower '{tower}': give --vision-tower, a "
            "folder with its weights"
        )
    tensors = without_unused(read_tensors(folder, allow_pickle))
    # A whole CLIP has a text tower beside it; a vision tower alone may go without the prefix.
    own = "vision_model." if any(name.startswith("vision_model.") for name in tensors) else ""
    return {
        STOCK[_TOWER] + name.removeprefix(own): value
        for name, value in tensors.items()
        if name.startswith(own)
    }
