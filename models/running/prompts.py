"""How large a prompt is: read off the arguments of a pass, and counted where nothing says it.

Encoders of images and videos run when a model is called, or ahead of that (`generate` does so). In
either case it is ``get_image_features`` that runs them. What that costs is counted product by
product the first time that pictures of some sizes come, whether the Graph has the encoder or not.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from planner.ir.cost import Workload
from planner.loading import visual_tokens
from planner.models.running.attention_blocks import named

# Methods of stock models that run encoders.
_ENCODERS = ("get_image_features", "get_video_features")
# Arguments that no encoder has to do with.
_OF_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels")
# PyTorch's own counter leaves out attention as it runs on a CPU.
_FORMULAS: Mapping[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
}
# Pictures of so many sizes are remembered.
_REMEMBERED = 1024
# Key of `Prompts` -> FLOPs that this thread or task has spent in encoders since its last prompt.
_encoded: ContextVar[Mapping[int, int]] = ContextVar(
    "planner_encoded", default=MappingProxyType({})
)
_keys = count()


class Prompts:
    """Reads the prompts of one model, and counts what its encoders do, once anybody asks.

    Args:
        way: the model, its decoder, and what lies between them.
    """

    def __init__(self, way: Sequence[nn.Module]) -> None:
        self._way = way
        # What encoders were given -> FLOPs.
        self._known: dict[object, int] = {}
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._key, self._local = next(_keys), threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model."""
        return {name: self.__dict__[name] for name in ("_way", "_known")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_anew()

    def watch(self) -> None:
        """Count what encoders do from now on."""
        for module in self._way[:-1]:
            for name in _ENCODERS:
                if hasattr(type(module), name):
                    module.__dict__.setdefault(name, _Encoder(self, module, name))

    def close(self) -> None:
        """Give the model back as it was."""
        for module in self._way[:-1]:
            for name in _ENCODERS:
                if isinstance(module.__dict__.get(name), _Encoder):
                    del module.__dict__[name]

    def read(
        self, call: tuple[nn.Module, Any, Any], given: Mapping[str, Any], new: int
    ) -> Workload:
        """The prompt that a decoder is given.

        In a padded batch that is the prompt as the base model runs it, with as many image tokens as
        the sample with the fewest has: no more than those are sure to be dropped.

        Args:
            call: a module of the way and its arguments: what the pass began with.
            given: the decoder's arguments by name.
            new: tokens that will be generated.
        """
        arguments = named(*call)
        embeddings = given.get("inputs_embeds")
        batch, tokens = (given["input_ids"] if embeddings is None else embeddings).shape[:2]
        ids, images = arguments.get("input_ids"), 0
        if isinstance(ids, Tensor) and tuple(ids.shape) == (batch, tokens):
            images = int(is_visual(ids, self._way[0]).sum(1).min())
        spent = self._spent()
        sees = any(
            value is not None and name not in _OF_TEXT
            for name, value in arguments.items()
            if isinstance(value, Tensor | Mapping)
        )
        return Workload(
            images,
            tokens - images,
            new,
            batch,
            logits=self._logits(call[0], arguments.get("logits_to_keep", 0), tokens),
            encoder_flops=spent if sees else 0,
        )

    def _logits(self, module: nn.Module, keep: Any, tokens: int) -> int:
        """Tokens of a sample that the output embedding is computed for, at most."""
        model: Any = self._way[0]
        if model.get_output_embeddings() is None:
            return 0
        # What a wrapper calls may lie inside the model, and the output embedding outside of that.
        if module is not model:
            return tokens
        return min(tokens, (keep.numel() if isinstance(keep, Tensor) else int(keep)) or tokens)

    # -- encoders --------------------------------------------------------------------------------

    def _spent(self) -> int:
        """FLOPs of encoders for the prompt that is read now."""
        spent = dict(_encoded.get())
        flops = spent.pop(self._key, 0)
        _encoded.set(MappingProxyType(spent))
        return flops

    def forget(self) -> None:
        """A pass is over: what its encoders did is of no prompt to come."""
        self._spent()

    def encode(self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an encoder; its FLOPs belong to the prompt that is read next."""
        if getattr(self._local, "is_busy", False):
            return run(*args, **kwargs)
        inputs = tuple(map(_sizes, args)), tuple((n, _sizes(v)) for n, v in sorted(kwargs.items()))
        if inputs in self._known:
            output = run(*args, **kwargs)
        else:
            with self._busy(), _Flops() as counter:
                output = run(*args, **kwargs)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[inputs] = counter.total
        spent = _encoded.get()
        total = spent.get(self._key, 0) + self._known[inputs]
        _encoded.set(MappingProxyType({**spent, self._key: total}))
        return output

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """What is called inside is counted already."""
        self._local.is_busy = True
        try:
            yield
        finally:
            self._local.is_busy = False


class _Encoder:
    """Stands for a method of a module that runs an encoder."""

    def __init__(self, prompts: Prompts, module: nn.Module, name: str) -> None:
        self.prompts, self.module, self.name = prompts, module, name

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._stock)

    @property
    def _stock(self) -> Any:
        return getattr(type(self.module), self.name).__get__(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method."""
        if torch.compiler.is_compiling():
            return self._stock(*args, **kwargs)
        return self.prompts.encode(self._stock, args, kwargs)


class _Flops(TorchDispatchMode):
    """Counts FLOPs as `torch.utils.flop_counter.FlopCounterMode`, but without global hooks."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = getattr(func, "_overloadpacket", func)
        if operator not in _FORMULAS and isinstance(func, torch._ops.OpOverload):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if operator in _FORMULAS:
            self.total += _FORMULAS[operator](*args, **kwargs, out_val=result)
        return result


def is_visual(ids: Tensor, model: nn.Module, *kinds: str) -> Tensor:
    """Which tokens stand for parts of images or videos, or of one kind, bool; `ids`'s shape."""
    tokens = visual_tokens(model.config, *kinds)
    return torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype, device=ids.device))


def _sizes(value: Any) -> object:
    """What an encoder's FLOPs follow from, of one of its arguments."""
    if not isinstance(value, Tensor):
        return value if isinstance(value, str | int | float | None) else None
    if not value.is_floating_point():
        return tuple(value.shape), tuple(value.flatten().tolist())
    # Empty pictures, which pad samples that have fewer, are left out by some models.
    pictures = int(value.flatten(2).any(-1).sum()) if value.ndim == 5 else 0
    return tuple(value.shape), pictures
