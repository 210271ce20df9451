"""A new projector that begins with words: an image becomes a list of what is where.

Trained by answers alone, a projector and low-rank changes have to find each other; begun with
embeddings that the text model has, the decoder reads a picture as it would read a list of words.
This is LLaVA's first stage, with words for patches in the place of captions. Every object is named
once, in the patch in its cell's middle, with its place beside its looks: so counting it and
finding it are questions about words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.training.data import Conversation
from planner.training.data.scenes import COLUMNS, ROWS, Scene
from planner.training.tiny_llava import CONCEPTS

_PICTURES = 32  # of a step
_RATE = 2e-3
NOTHING = "empty"  # the word for a patch in which nothing is named
WORDS = (*CONCEPTS, *ROWS, *COLUMNS, NOTHING)


def word_embeddings(model: Any, tokenizer: Any, words: Sequence[str]) -> Tensor:
    """Each word's mean embedding in the model's decoder, shape (words, width)."""
    table = model.get_input_embeddings().weight.detach()
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    return torch.stack([table[each].mean(0) for each in ids])


def patch_words(scene: Scene, side: int) -> Tensor:
    """Which of `WORDS` each patch should be read as, shape (side * side, words), of 0 and 1.

    The patch in the middle of an object's cell gets the object's words and its place's; a text's
    characters get a patch each, in order, in the middle of its row; all others are `NOTHING`.
    """
    words = torch.zeros(side, side, len(WORDS))
    rows, columns = (
        [int((i + 0.5) * side / len(names)) for i in range(len(names))] for names in (ROWS, COLUMNS)
    )
    for o in scene.objects:
        for word in (o.size, o.color, o.shape, ROWS[o.row], COLUMNS[o.column]):
            words[rows[o.row], columns[o.column], WORDS.index(word)] = 1
    if scene.text is not None and scene.text_row is not None:
        first = (side - len(scene.text)) // 2
        for column, character in enumerate(scene.text, first):
            words[rows[scene.text_row], column, WORDS.index(character)] = 1
    words[..., WORDS.index(NOTHING)] = words.sum(-1) == 0
    return words.flatten(0, 1)


def patch_targets(words: Tensor, embeddings: Tensor) -> Tensor:
    """What patches should become, shape (images, patches, width): the sum of their words.

    The sum is divided by the root of their number, so that many words are as long as one.

    Args:
        words: of each patch, shape (images, patches, words), of 0 and 1, at least one each.
        embeddings: of the words, shape (words, width).
    """
    return words @ embeddings / words.sum(-1, keepdim=True).sqrt()


def align_projector(
    model: Any,
    processor: Any,
    conversations: Sequence[Conversation],
    steps: int,
    say: Callable[[str], None] = print,
) -> None:
    """Train the projector alone, in float32, by the squared distance from `patch_targets`.

    Args:
        model: a LLaVA; its tower and decoder stay.
        processor: of the model.
        conversations: about rendered scenes, of which it is known what their patches show.
        steps: of 32 pictures.
        say: told once, what share of the targets' variance is left.

    Raises InputError: a conversation has no scene.
    """
    projector = model.model.multi_modal_projector
    embeddings = word_embeddings(model, processor.tokenizer, WORDS)
    nothing = WORDS.index(NOTHING)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    left = 0.0
    for step in range(steps):
        batch = [conversations[step * _PICTURES + i] for i in range(_PICTURES)]
        scenes = [each.scene for each in batch if each.scene is not None]
        if len(scenes) < len(batch):
            raise InputError("align_steps needs rendered scenes; set it to 0 for other pictures")
        pixels = processor.image_processor([each.image for each in batch], return_tensors="pt")
        features = model.model.get_image_features(pixels["pixel_values"]).pooler_output
        found = torch.stack(list(features))
        words = torch.stack([patch_words(scene, math.isqrt(found.shape[1])) for scene in scenes])
        targets = patch_targets(words, embeddings)
        missed = (found - targets).square().mean(-1)
        named = words[..., nothing] == 0
        # The few patches that are named count as much as the many that are not.
        loss = (missed[named].mean() + missed[~named].mean()) / targets[named].var()
        loss.backward(inputs=list(projector.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        left = float(loss.detach())
    say(f"projector aligned with words: {left:.1%} of their variance is left")
