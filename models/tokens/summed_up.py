"""VoCo tokens: an image summed up in a few tokens, which all that follows sees in its place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from planner.ir.errors import InputError
from planner.models.running.attention_blocks import named
from planner.models.running.prompts import is_visual
from planner.models.tokens.kept_tokens import select_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.models.running.forward_pass import Call

TOKEN, TOKEN_ID = "<voco>", "voco_token_id"


@dataclass(frozen=True, eq=False)
class SummedUp:
    """Where VoCo tokens stand among the tokens of a batch, shape (batch,), int64.

    Samples without any have -1 and the number of tokens, so nothing is hidden of them.
    """

    first: Tensor
    last: Tensor

    @staticmethod
    def of(flags: Tensor) -> SummedUp:
        """From which tokens are VoCo tokens, shape (batch, tokens), bool."""
        tokens, found = flags.shape[1], flags.any(1)
        first = flags.int().argmax(1)
        last = tokens - 1 - flags.flip(1).int().argmax(1)
        return SummedUp(torch.where(found, first, -1), torch.where(found, last, tokens))

    def visible(self, queries: Tensor, keys: Tensor, rows: Tensor | None = None) -> Tensor:
        """Which keys are not hidden from which queries, (rows, 1, queries, keys), bool.

        Places of both have shape (rows, n), `rows` are of the batch, None for all.
        """
        first, last = (select_rows(place, rows, 0) for place in (self.first, self.last))
        behind = queries > last[:, None]
        return ~(behind[:, :, None] & (keys < first[:, None])[:, None, :])[:, None]

    def narrow(
        self, mask: Tensor | None, queries: Tensor, keys: Tensor, rows: Tensor | None
    ) -> Tensor:
        """A mask (rows, 1, queries, keys), or None for causal, with the image hidden in it too."""
        visible = self.visible(queries, keys, rows)
        if mask is None:
            earlier = (keys[:, None, :] <= queries[:, :, None]) & (keys >= 0)[:, None, :]
            return visible & earlier[:, None]
        if mask.dtype == torch.bool:
            return mask & visible
        return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


class SummingStage:
    """Finds the VoCo tokens of a prompt.

    `model`: the whole model. `places`: carries flags of the model's tokens over to those of the
    decoder, see `TokenStages`. Raises InputError: the model was not trained with such tokens.
    """

    def __init__(
        self, model: nn.Module, places: Callable[[Tensor, bool], Tensor] | None = None
    ) -> None:
        self.model = model
        self.arguments: dict[str, Any] = {}  # of the model in this pass
        self._places = places or (lambda known, value: known)
        config: Any = model.config
        self._token = getattr(config, TOKEN_ID, None)
        if self._token is None:
            raise InputError(
                f"voco is for models that were trained with VoCo tokens, and the config of this "
                f"{type(model).__name__} names none ({TOKEN_ID})"
            )

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the model was called with, or the part of it that a pass began with."""
        self.arguments = named(module, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, call: Call) -> None:
        """Note in a pass of several tokens where the VoCo tokens are, before layer 0.

        Raises InputError: there is no telling, or they do not stand for all images.
        """
        ids = self.arguments.get("input_ids")
        if ids is None:
            raise InputError("voco finds VoCo tokens among input_ids: call the whole model")
        flags, image = ids == self._token, is_visual(ids, self.model)
        if call.past and bool(flags.any() or image.any()):
            raise InputError(
                "voco reads an image at the head of a conversation: start with a new cache"
            )
        if not flags.any() and not image.any():
            return
        found = SummedUp.of(flags)
        places = torch.arange(ids.shape[1], device=ids.device)
        if (image & (places >= found.first[:, None])).any():
            raise InputError(
                "voco takes one image a prompt, in front of the VoCo tokens: ask by the model's "
                "own chat template"
            )
        flags = self._places(flags, False).to(call.device)
        call.summed_up = SummedUp.of(flags)


def add_voco_tokens(model: Any, processor: Any, count: int) -> None:
    """Give a LLaVA a VoCo token, and its chat template an image and `count` of them in front.

    The template then says what the authors' prompts do: the image, a line end, the tokens, a line
    end, and the conversation without the image. Raises InputError: the processor has no chat
    template.
    """
    if not processor.chat_template:
        raise InputError("VoCo tokens go into a chat template, and the model's processor has none")
    tokenizer = processor.tokenizer
    tokenizer.add_tokens([TOKEN], special_tokens=True)
    number = tokenizer.convert_tokens_to_ids(TOKEN)
    if number >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(number + 1)
    setattr(model.config, TOKEN_ID, number)
    conversation = re.sub(
        re.escape(processor.image_token) + r"(\\n|\n)?", "", processor.chat_template
    )
    processor.chat_template = (
        "{% for message in messages if message['content'] is not string %}"
        "{% for part in message['content'] if part['type'] == 'image' %}"
        f"{{{{ '{processor.image_token}\\n{TOKEN * count}\\n' }}}}"
        "{% endfor %}{% endfor %}" + conversation
    )
