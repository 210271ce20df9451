"""Planned image-text models in lmms-eval, which finds this by an entry point.

    lmms_eval --model planner --model_args pretrained=FOLDER,budget=0.65,device=cpu --tasks mme

`pretrained`, `dtype`, `device` and `system_prompt` say which model; `budget`, `tokens`, `utilities`
and the like are for `planner.compile`. Questions are asked by the model's own chat template.
"""

from __future__ import annotations

from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator

import planner
from planner.integrations.harness_options import taken_out
from planner.ir.errors import InputError
from planner.loading import load_model


def manifest() -> ModelManifest:
    """What the entry point says."""
    return ModelManifest("planner", chat_class_path=f"{__name__}.PlannedLMM")


class PlannedLMM(lmms):  # type: ignore[misc]
    """A stock model under a budget, asked in batches of questions with equal options."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        system_prompt: str = "",
        **options: Any,
    ) -> None:
        super().__init__()
        chosen = taken_out(options)
        if options:
            raise InputError(f"unknown model argument '{min(options)}'")
        self.model, self.processor, _ = load_model(pretrained, dtype, device)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"
        self.batch_size, self.system_prompt = int(batch_size), system_prompt
        planner.compile(self.model, processor=self.processor, **chosen)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """An answer to each request, cut at the first of its ``until``."""
        arguments = [request.args for request in requests]
        groups = Collator(arguments, lambda x: -len(x[0]), group_fn=lambda x: x[2], grouping=True)
        answers: list[str] = []
        for chunk in groups.get_batched(n=self.batch_size):
            chats = [
                ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
                for _, to_messages, _, number, task, split in chunk
            ]
            wanted = dict(chunk[0][2])
            until = wanted.pop("until", [])
            for text, (context, *_) in zip(self._answers(chats, wanted), chunk, strict=True):
                for end in [until] if isinstance(until, str) else until:
                    text = text.split(end)[0] if end else text
                answers.append(text)
                self.cache_hook.add_partial("generate_until", (context, chunk[0][2]), text)
        ordered: list[str] = groups.get_original(answers)
        return ordered

    def _answers(self, chats: list[ChatMessages], wanted: dict[str, Any]) -> list[str]:
        """By ``generate``, greedily unless a temperature is given."""
        messages = [chat.to_hf_messages() for chat in chats]
        if self.system_prompt:
            messages = [self._apply_system_prompt(m, self.system_prompt) for m in messages]
        images = [image for chat in chats for image in chat.extract_media()[0]]
        if any(media for chat in chats for media in chat.extract_media()[1:]):
            raise InputError(
                "only texts and pictures are read: choose tasks without video and sound"
            )
        texts = [
            self.processor.apply_chat_template(m, tokenize=False, add_generation_prompt=True)
            for m in messages
        ]
        seen = {"images": images} if images else {}
        inputs = self.processor(text=texts, padding=True, return_tensors="pt", **seen)
        inputs = inputs.to(self.model.device, self.model.dtype)
        temperature = float(wanted.pop("temperature", 0) or 0)
        random = {"temperature": temperature, "top_p": wanted.pop("top_p", None)}
        given = {
            "max_new_tokens": wanted.pop("max_new_tokens", 1024),
            "num_beams": wanted.pop("num_beams", 1),
            "do_sample": temperature > 0,
        }
        with torch.inference_mode():
            found = self.model.generate(**inputs, **given, **(random if temperature else {}))
        new = found[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not for chats, whose tasks are answered freely."""
        raise NotImplementedError("planner answers questions: choose tasks with generate_until")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """As `loglikelihood`."""
        raise NotImplementedError("planner answers single rounds: choose tasks with generate_until")
