"""CLIP's text tower beside a LLaVA: questions and patches in one space.

What is asked is no argument of a stock model but as tokens among others, of another tokenizer. So
`question` says it, for the thread or task that calls the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad
from transformers import AutoTokenizer, CLIPModel

from planner.ir.errors import InputError

_asked: ContextVar[tuple[str, ...]] = ContextVar("planner_asked", default=())


@contextmanager
def question(asked: str | Sequence[str]) -> Iterator[None]:
    """Say what is asked about the images of the calls inside, for selectors that compare them.

    `asked`: the question alone, without a chat template; or one for each image of a batch.
    """
    token = _asked.set((asked,) if isinstance(asked, str) else tuple(asked))
    try:
        yield
    finally:
        _asked.reset(token)


class TextTower(nn.Module):
    """The text tower and both projections of a CLIP model.

    `folder`: of the CLIP model, in transformers' format, with its tokenizer. Raises InputError:
    there is no such model in the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"'{folder}' holds no CLIP model with a tokenizer: {reason}") from None
        self._tokenizer = tokenizer
        self._folder = folder
        self.text_model, self.text_projection = model.text_model, model.text_projection
        self.post_layernorm = model.vision_model.post_layernorm
        self.visual_projection = model.visual_projection
        self.requires_grad_(False).eval()

    def patches(self, features: Tensor) -> Tensor:
        """Patches of the tower, (runs, patches, width), in the joint space, (runs, patches, d)."""
        width = self.visual_projection.in_features
        if features.shape[-1] != width:
            raise InputError(
                f"the vision tower has a width of {features.shape[-1]}, and that of the CLIP model "
                f"in '{self._folder}' {width}: it is another one"
            )
        projected: Tensor = self.visual_projection(self.post_layernorm(features.to(self._dtype)))
        return projected

    def read(self, runs: int, whole: bool) -> Tensor:
        """What is asked about each run of the vision encoder, in the joint space, (runs, d).

        `runs`: of the vision encoder. `whole`: take all chunks that a question has, each a
        direction, and their mean; else the first alone, as it is. Raises InputError: nobody said
        what is asked, or there is no telling to which run it belongs.
        """
        asked = _asked.get()
        if not asked:
            raise InputError(
                "this plan compares images with the question: call the model within "
                "planner.question(...), which says what is asked"
            )
        if len(asked) not in (1, runs):
            raise InputError(
                f"planner.question has {len(asked)} questions, and the images are encoded in "
                f"{runs} runs: give one question, or one for each"
            )
        made = torch.stack([self._read(text, whole) for text in asked])
        return made.expand(runs, -1)

    def _read(self, text: str, whole: bool) -> Tensor:
        length = self.text_model.config.max_position_embeddings
        kept = {} if whole else {"truncation": True, "max_length": length}
        read = self._tokenizer(text, return_tensors="pt", **kept)
        parts = {}
        for name in ("input_ids", "attention_mask"):
            ids = read[name].to(self.text_projection.weight.device)
            parts[name] = pad(ids, (0, -ids.shape[1] % length)).view(-1, length)
        embedded: Tensor = self.text_projection(self.text_model(**parts).pooler_output)
        return normalize(embedded, dim=-1).mean(0) if whole else embedded[0]

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.visual_projection.weight.dtype
        return dtype
