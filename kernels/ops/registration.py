"""An op of planner: what PyTorch, its compilers and its autograd must know of one.

An op lists tensors and numbers one by one, as its schema must; survivors are four of them. Its
gradients are an op of their own, so that they are as opaque to a compiler as the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from planner.kernels.survivors import Survivors

__all__ = ["Gradients", "Op"]

_SURVIVORS = "Tensor units, Tensor counts, Tensor? lanes, int width"
# What the Triton kernels compute with; of anything else PyTorch takes care.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Gradients = dict[str, Tensor]
"""Gradients by the names of inputs."""


class Op:
    """One op, registered as ``planner::name``; see `planned` and `plain` for its two forms.

    Calling it without a need for gradients runs it at once, without PyTorch's dispatcher, whose
    checks take longer than a product of a decoded token.

    Args:
        name: of the op.
        schema: its inputs, survivors and ``triton`` aside.
        forward: computes it; takes the inputs, survivors where there are any, and whether Triton
            does it.
        fake: an empty result; takes the inputs and, where there are any, survivors.
        backward: (gradient, names of the inputs whose gradients are wanted, inputs, survivors) to
            these gradients by name; None for an op without.
        survivors: whether the op reads survivors.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        forward: Callable[..., Tensor],
        fake: Callable[..., Tensor],
        backward: Callable[..., Gradients] | None = None,
        survivors: bool = True,
    ) -> None:
        self.name, self._forward, self._survivors = name, forward, survivors
        whole = f"{schema}, {_SURVIVORS}, bool triton" if survivors else f"{schema}, bool triton"
        self._operator = torch.library.custom_op(
            f"planner::{name}", self._run, mutates_args=(), schema=f"({whole}) -> Tensor"
        )
        self.overload: Any = self._operator._opoverload
        self._names = [argument.name for argument in self.overload._schema.arguments]
        self._operator.register_fake(lambda *flat: fake(*self._split(flat)[0]))
        if backward is not None:
            self._register_backward(name, whole, backward)

    def __call__(self, *inputs: Any, triton: bool) -> Tensor:
        """Compute the op; survivors are the last of the inputs where it reads any."""
        if _is_plain(inputs):
            return self._checked(inputs, triton)
        result: Tensor = self.overload(*self.flat(*inputs, triton=triton))
        return result

    def flat(self, *inputs: Any, triton: bool) -> tuple[Any, ...]:
        """Arguments in the order of the schema, for a call in a graph."""
        if not self._survivors:
            return (*inputs, triton)
        *others, kept = inputs
        return (*others, kept.units, kept.counts, kept.lanes, kept.width, triton)

    def _split(self, flat: Sequence[Any]) -> tuple[tuple[Any, ...], bool]:
        *inputs, triton = flat
        if self._survivors:
            *inputs, units, counts, lanes, width = inputs
            inputs.append(Survivors(units, counts, width, lanes))
        return tuple(inputs), triton

    def _run(self, *flat: Any) -> Tensor:
        return self._checked(*self._split(flat))

    def _checked(self, inputs: tuple[Any, ...], triton: bool) -> Tensor:
        if self._survivors:
            inputs[-1].require(len(inputs[0]))
        return self._forward(*inputs, triton and inputs[0].dtype in _DTYPES)

    def _register_backward(
        self, name: str, schema: str, backward: Callable[..., Gradients]
    ) -> None:
        def pull_back(gradient: Tensor, needed: list[int], *flat: Any) -> list[Tensor]:
            wanted = [self._names[index] for index in needed]
            found = backward(gradient, wanted, *self._split(flat)[0])
            return [found[name] for name in wanted]

        torch.library.custom_op(
            f"planner::{name}_backward",
            pull_back,
            mutates_args=(),
            schema=f"(Tensor gradient, int[] needed, {schema}) -> Tensor[]",
        ).register_fake(
            lambda gradient, needed, *flat: [torch.empty_like(flat[index]) for index in needed]
        )
        pull_op = getattr(torch.ops.planner, f"{name}_backward")

        def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            tensors = [value if isinstance(value, Tensor) else None for value in inputs]
            ctx.save_for_backward(*tensors)
            ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

        def pull(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            inputs = [
                other if tensor is None else tensor
                for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)
            ]
            needed = [index for index, need in enumerate(ctx.needs_input_grad) if need]
            results: list[Tensor | None] = [None] * len(inputs)
            for index, part in zip(needed, pull_op(gradient, needed, *inputs), strict=True):
                results[index] = part
            return tuple(results)

        self._operator.register_autograd(pull, setup_context=remember)


def _is_plain(inputs: Sequence[Any]) -> bool:
    """Whether nothing traces a call or wants gradients of it."""
    if torch.compiler.is_compiling():
        return False
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
