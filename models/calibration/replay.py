"""One sample's forward pass, repeated: many rows at once, from any layer on.

What does not depend on the decoder's switches is computed once: image features, and for a pass
that starts at layer k the hidden states before it. The stock code runs around that unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from planner.ir.errors import InputError
from planner.models.calibration.samples import Sample, together
from planner.models.running.bindings import BoundLayer
from planner.models.running.patches import Patches

NOT_FINITE = "the model's output is not finite for a sample: look for broken weights or images"


def last_logits(model: nn.Module, count: int) -> dict[str, int]:
    """The argument by which a model computes logits of its last tokens alone, where it has one."""
    known = inspect.signature(type(model).forward).parameters
    return {"logits_to_keep": count} if "logits_to_keep" in known else {}


@dataclass(eq=False)
class Replay:
    """A sample on `rows` equal rows, run by a dense stock transformers model.

    `base` is what that says: log-probabilities at the answer, shape (answer, vocabulary); of a
    sample of several rows (`planner.models.calibration.samples.together`), at all of their
    answers. Raises InputError where they are not finite.
    """

    model: nn.Module
    layers: Sequence[BoundLayer]
    sample: Sample
    rows: int

    def __post_init__(self) -> None:
        self._inputs = {
            **next(together([self.sample] * self.rows, self.rows)).inputs,
            **last_logits(self.model, self.sample.answer + 1),
            "use_cache": False,
        }
        self._features: dict[nn.Module, Any] = {}
        self._outputs: dict[int, Tensor] = {}
        # Run the dense model once, noting what every layer returns for one row.
        with torch.no_grad(), ExitStack() as hooks:
            for layer in self.layers:
                note = partial(self._note, layer.index)
                hooks.enter_context(layer.module.register_forward_hook(note))
            self.base = self.log_probabilities(0)[0].clone()
        if not torch.isfinite(self.base).all():
            raise InputError(NOT_FINITE)

    def _note(self, index: int, module: nn.Module, _: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise InputError(
                f"{type(module).__name__} returns a tuple, as layers did before transformers 5; "
                "use a newer version"
            )
        self._outputs[index] = output[: len(output) // self.rows].clone()

    def log_probabilities(self, start: int) -> Tensor:
        """What the model says at the answer under the gates that are active now.

        No gate acts before the decoder layer `start`; earlier layers are not run. Shape (rows,
        answer, vocabulary), float32; as `base` where the sample has rows of its own.
        """
        with Patches() as patches:
            for module in self.model.modules():
                if hasattr(type(module), "get_image_features"):
                    patches.set(module, "get_image_features", self._remembered(module))
            for layer in self.layers[:start]:
                patches.set(layer.module, "forward", self._past(layer.index))
            logits: Tensor = self.model(**self._inputs).logits
        answers = logits[:, -self.sample.answer - 1 : -1].float().log_softmax(-1)
        return answers.view(self.rows, -1, answers.shape[-1])

    def _remembered(self, module: Any) -> Callable[..., Any]:
        stock = module.get_image_features

        def features(*args: Any, **kwargs: Any) -> Any:
            if module not in self._features:
                with torch.no_grad():
                    self._features[module] = stock(*args, **kwargs)
            return self._features[module]

        return features

    def _past(self, index: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            known, is_one = self._outputs[index], len(self._outputs[index]) == 1
            return known.expand(self.rows, -1, -1) if is_one else known.repeat(self.rows, 1, 1)

        return forward
