"""Calibration samples of text, of built-in text and pictures, and of text a model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner import files
from planner.ir.errors import InputError
from planner.models.calibration.samples import Sample

# Long enough that most tokens see a context, short enough for many passages a minute.
PASSAGE_TOKENS = 192
_MOST_BYTES = 256 * files.MEBIBYTE


def read_text(path: Path) -> str:
    """The text of a file.

    Raises InputError: it is missing, unreadable, too large or empty.
    """
    text = files.read_text(path, "text file", _MOST_BYTES)
    if not text.strip():
        raise InputError(f"the text file '{path}' is empty")
    return text


def passages(tokenizer: Any, text: str, count: int, tokens: int = PASSAGE_TOKENS) -> Tensor:
    """Passages at equal distances through a text.

    Args:
        tokenizer: of the model, or a processor that has one.
        text: where passages are taken from.
        count: most passages to take.
        tokens: of a passage.

    Returns token ids, shape (passages, tokens). Raises InputError: the text is shorter than a
    passage.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    whole = ids[: len(ids) // tokens * tokens].view(-1, tokens)
    if not len(whole):
        raise InputError(f"the text has {len(ids)} tokens, and a passage takes {tokens}")
    taken = torch.linspace(0, len(whole) - 1, min(count, len(whole))).long()
    return whole[taken]


def text_samples(ids: Tensor) -> list[Sample]:
    """Passages as calibration samples, in which every token but the first is to be predicted.

    `ids`: shape (passages, tokens).
    """
    return [Sample({"input_ids": row[None]}, len(row) - 1) for row in ids]


@torch.no_grad()
def written_samples(
    model: Any, count: int, tokens: int = PASSAGE_TOKENS, seed: int = 0
) -> list[Sample]:
    """Text that a language model writes itself: samples in its own words, without a tokenizer.

    Args:
        model: draws from its distribution, from the first token on.
        count: passages.
        tokens: of a passage.
    """
    start = _first_token(model)
    ids = torch.full((count, 1), start, device=model.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
    return text_samples(ids[:, 1:])


def _first_token(model: Any) -> int:
    for config in (model.generation_config, model.config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(config, name, None)
            first = value[0] if isinstance(value, Sequence) else value
            if first is not None:
                return int(first)
    return 0
