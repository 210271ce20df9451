"""A new projector that begins with words: what a patch shows, as the text model's own embeddings.

Trained by answers alone, a projector and low-rank changes have to find each other; begun with
embeddings that the text model has, the decoder reads a picture as it would read a list of words.
This is LLaVA's first stage, with the mean embedding of a patch's words in the place of captions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from planner.ir.errors import InputError
from planner.training.data import Conversation
from planner.training.tiny_llava import CONCEPTS, patch_concepts

_PICTURES = 32  # of a step
_RATE = 2e-3
NOTHING = "empty"  # the word for a patch that shows nothing


def word_embeddings(model: Any, tokenizer: Any, words: Sequence[str]) -> Tensor:
    """Each word's mean embedding in the model's decoder, shape (words, width)."""
    table = model.get_input_embeddings().weight.detach()
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    return torch.stack([table[each].mean(0) for each in ids])


def patch_targets(concepts: Tensor, words: Tensor, nothing: Tensor) -> Tensor:
    """What patches should become, shape (images, patches, width): the mean of their words.

    Args:
        concepts: what each patch shows, shape (images, patches, concepts), of 0 and 1.
        words: of the concepts, shape (concepts, width).
        nothing: of a patch that shows none, shape (width,).
    """
    count = concepts.sum(-1, keepdim=True)
    return torch.where(count > 0, concepts @ words / count.clamp(min=1), nothing)


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
    *words, nothing = word_embeddings(model, processor.tokenizer, [*CONCEPTS, NOTHING])
    optimizer = torch.optim.AdamW(projector.parameters(), lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    left = 0.0
    for step in range(steps):
        batch = [conversations[step * _PICTURES + i] for i in range(_PICTURES)]
        scenes = [each.scene for each in batch if each.scene is not None]
        if len(scenes) < len(batch):
            raise InputError("align_steps needs rendered scenes; set it to 0 for other pictures")
        shown = torch.stack([patch_concepts(scene, processor.patch_size) for scene in scenes])
        targets = patch_targets(shown, torch.stack(words), nothing)
        pixels = processor.image_processor([each.image for each in batch], return_tensors="pt")
        features = model.model.get_image_features(pixels["pixel_values"]).pooler_output
        loss = mse_loss(torch.stack(list(features)), targets) / targets.var()
        loss.backward(inputs=list(projector.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        left = float(loss.detach())
    say(f"projector aligned with words: {left:.1%} of their variance is left")
