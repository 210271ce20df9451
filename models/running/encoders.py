"""What runs in front of a decoder's layers: encoders of images, videos and words, and projectors.

They run when a model is called, or ahead of that (`generate` does so): modules beside the decoder,
methods of the model, or modules that the decoder itself calls before its layers. What they cost is
counted product by product the first time that inputs of some sizes come, whether the Graph has them
or not.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from planner.ir.errors import InputError
from planner.ir.lowering.counted_flops import CountedFlops
from planner.ir.lowering.example_inputs import ENCODED
from planner.models.running.attention_blocks import named

# Methods of stock models that run encoders, whatever these are.
_METHODS = ("get_image_features", "get_video_features")
# Arguments whose values no encoder's FLOPs depend on.
OF_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels")
# Inputs of so many sizes are remembered.
_REMEMBERED = 1024
# Key of `Encoders` -> FLOPs that this thread or task has spent in them since its last prompt.
_spent: ContextVar[Mapping[int, int]] = ContextVar("planner_spent", default=MappingProxyType({}))
# FLOPs that this thread or task has left out of the encoder that runs now.
_left_out: ContextVar[int] = ContextVar("planner_left_out", default=0)
_keys = count()


def note_left_out(flops: int) -> None:
    """Say that the encoder which runs now computes less than in the base model.

    What is remembered of its inputs is what the base model spends on them, whatever the plan.
    """
    _left_out.set(_left_out.get() + flops)


@dataclass(frozen=True)
class Entered:
    """What a decoder has made of its arguments when its first layer begins."""

    flops: int  # of encoders inside it
    tokens: int  # of a sample, those of pictures among them
    encoded: int  # rows that the last of these encoders has put out, of all samples


class _FirstLayer(Exception):
    """Ends a pass that was made to see what reaches the first layer."""


class Encoders:
    """Counts what the encoders of one model do, once anybody asks.

    Args:
        way: the model, its decoder, and what lies between them.
    """

    def __init__(self, way: Sequence[nn.Module]) -> None:
        self._way = way
        self._handles: list[Any] = []
        self._numbers: dict[nn.Module, int] = {}
        # What encoders were given -> FLOPs.
        self._known: dict[object, int] = {}
        # Of what a decoder was given.
        self._entered: dict[object, Entered] = {}
        self._inside: list[nn.Module] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._key, self._local = next(_keys), threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model."""
        kept = ("_way", "_handles", "_numbers", "_known", "_entered", "_inside")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_anew()

    def watch(self, known: Iterable[str]) -> None:
        """Count what they do from now on.

        Args:
            known: paths of modules of the decoder that are priced without it.
        """
        if self._handles:
            return
        beside, self._inside = list(self._beside()), list(self._unknown(set(known)))
        self._numbers = {module: n for n, module in enumerate((*beside, *self._inside))}
        self._handles = [handle for module in beside for handle in self._hooks(module)]
        for module in self._way[:-1]:
            for name in _METHODS:
                if hasattr(type(module), name):
                    module.__dict__.setdefault(name, _Method(self, module, name))

    def _hooks(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def close(self) -> None:
        """Give the model back as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in self._way[:-1]:
            for name in _METHODS:
                if isinstance(module.__dict__.get(name), _Method):
                    del module.__dict__[name]

    def _beside(self) -> Iterator[nn.Module]:
        """Modules beside the decoder, without the output embedding, which every Graph has."""
        model: Any = self._way[0]
        head = model.get_output_embeddings()
        pending = [child for outer in self._way[:-1] for child in outer.children()]
        while pending:
            module = pending.pop()
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                pending += module.children()
            elif module not in self._way and all(inner is not head for inner in module.modules()):
                yield module

    def _unknown(self, known: Set[str]) -> Iterator[nn.Module]:
        """The largest modules of the decoder that nothing known is in, and that have weights."""
        decoder = self._way[-1]
        way = next(name for name, module in self._way[0].named_modules() if module is decoder)
        above = {path[:end] for path in known for end, c in enumerate(path) if c == "."}
        pending = [(f"{way}.{name}" if way else name, m) for name, m in decoder.named_children()]
        while pending:
            path, module = pending.pop()
            if path in known or not any(True for _ in module.parameters()):
                continue
            if path in above:
                pending += [(f"{path}.{name}", inner) for name, inner in module.named_children()]
            else:
                yield module

    # -- counting ----------------------------------------------------------------------------

    def entering(self, given: Mapping[str, Any], first: nn.Module) -> Entered | None:
        """What a decoder makes of its arguments; None where no encoder is inside it.

        A plan is made when the decoder begins, and these come later. So the first time that inputs
        of some sizes come, the decoder runs once more, as far as its first layer. Call `take_spent`
        before, for what ran until now.
        """
        if not self._inside or not any(_is_picture(*item) for item in given.items()):
            return None
        inputs = tuple((name, _sizes(name, value)) for name, value in given.items())
        if inputs not in self._entered:
            tokens, encoded = self._until(first, given)
            if len(self._entered) >= _REMEMBERED:
                self._entered.clear()
            self._entered[inputs] = Entered(self.take_spent(), tokens, encoded)
        return self._entered[inputs]

    def _until(self, first: nn.Module, given: Mapping[str, Any]) -> tuple[int, int]:
        """Run the decoder as far as its first layer: `Entered.tokens` and `Entered.encoded`."""

        def note(module: nn.Module, args: Any, output: Any) -> None:
            states = getattr(output, "last_hidden_state", output)
            if isinstance(states, Tensor):
                rows.append(states.shape[:-1].numel())

        def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            values = (*args, *kwargs.values())
            states = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
            raise _FirstLayer(states.shape[1])

        rows = [0]
        handles = [first.register_forward_pre_hook(stop, with_kwargs=True)]
        for module in self._inside:
            handles += [*self._hooks(module), module.register_forward_hook(note)]
        # Some decoders add to their arguments in place.
        copied = {n: v.clone() if isinstance(v, Tensor) else v for n, v in given.items()}
        try:
            with torch.no_grad():
                self._way[-1].forward(**copied)
        except _FirstLayer as reached:
            return reached.args[0], rows[-1]
        finally:
            for handle in handles:
                handle.remove()
        raise InputError("the decoder has not called its first layer: there is no prompt")

    def take_spent(self) -> int:
        """FLOPs for the prompt that is read now; those of the next count from zero."""
        if self._running is not None:
            self._stop()
        spent = dict(_spent.get())
        flops = spent.pop(self._key, 0)
        _spent.set(MappingProxyType(spent))
        return flops

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A module beside the decoder begins."""
        if torch.compiler.is_compiling():
            return
        if self._running is module:
            self._stop()
        if self._running is not None:
            return
        given = named(module, args, kwargs)
        inputs = self._numbers[module], *((name, _sizes(name, v)) for name, v in given.items())
        if inputs in self._known:
            self._add(inputs)
            return
        _left_out.set(0)
        self._local.running = module, inputs, CountedFlops()
        self._local.running[-1].__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """It has ended; the output of one that failed is None."""
        if torch.compiler.is_compiling() or self._running is not module:
            return
        _, inputs, counter = self._local.running
        self._stop()
        if output is not None:
            self._learn(inputs, counter.total)

    @property
    def _running(self) -> object:
        """The module or the method whose FLOPs are counted in this thread, or are known."""
        return getattr(self._local, "running", (None,))[0]

    def _stop(self) -> None:
        """Count no longer; also where Ctrl-C has cut a module short, which tells nobody."""
        *_, counter = self._local.running
        self._local.running = (None,)
        if counter is not None:
            counter.__exit__(None, None, None)

    def run(self, method: Any, inputs: object, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a method that runs encoders."""
        if self._running is not None:
            return method(*args, **kwargs)
        counter = None if inputs in self._known else CountedFlops()
        _left_out.set(0)
        self._local.running = method, inputs, None
        try:
            with counter or nullcontext():
                output = method(*args, **kwargs)
        finally:
            self._local.running = (None,)
        if counter is None:
            self._add(inputs)
        else:
            self._learn(inputs, counter.total)
        return output

    def _learn(self, inputs: object, flops: int) -> None:
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[inputs] = flops + _left_out.get()
        self._add(inputs)

    def _add(self, inputs: object) -> None:
        """FLOPs that inputs stand for belong to the prompt that is read next."""
        spent = _spent.get()
        total = spent.get(self._key, 0) + self._known[inputs]
        _spent.set(MappingProxyType({**spent, self._key: total}))


class _Method:
    """Stands for a method of a module that runs encoders."""

    def __init__(self, encoders: Encoders, module: nn.Module, name: str) -> None:
        self.encoders, self.module, self.name = encoders, module, name

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
        given = (*enumerate(args), *sorted(kwargs.items()))
        inputs = self.name, *((name, _sizes(name, value)) for name, value in given)
        return self.encoders.run(self._stock, inputs, args, kwargs)


def _sizes(name: object, value: Any) -> object:
    """What an encoder's FLOPs follow from, of one of its arguments."""
    if isinstance(value, list | tuple):
        return tuple(_sizes(name, item) for item in value)
    if not isinstance(value, Tensor):
        return value if isinstance(value, str | int | float | None) else None
    if name in OF_TEXT:
        return tuple(value.shape)
    if not value.is_floating_point():
        return tuple(value.shape), hash(value.cpu().numpy().tobytes())
    # Empty pictures, which pad samples that have fewer, are left out by some models.
    pictures = int(value.flatten(2).any(-1).sum()) if value.ndim == 5 else 0
    return tuple(value.shape), pictures


def _is_picture(name: str, value: Any) -> bool:
    """Whether a decoder's argument is for an encoder inside it."""
    is_state = name in ENCODED or name.endswith(("mask", "embeds"))
    return isinstance(value, Tensor) and value.is_floating_point() and not is_state
