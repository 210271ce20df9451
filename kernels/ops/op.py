"""An op of planner: its inputs are the fields of a class, and what is known about it the methods.

PyTorch, its compilers and its autograd know each as ``planner::name``; gradients are an op of their
own, as opaque to a compiler as the forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self, get_type_hints

import torch
from torch import Tensor

from planner.ir.errors import InputError
from planner.kernels.survivors import Survivors

# What a field's type is called in a schema. Survivors are tensors and a number.
_SCHEMA: dict[object, str] = {
    Tensor: "Tensor {}",
    Tensor | None: "Tensor? {}",
    str: "str {}",
    float: "float {}",
    bool: "bool {}",
    Survivors: "Tensor units, Tensor counts, Tensor? lanes, int width",
}
# What the Triton kernels compute with.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Gradients = dict[str, Tensor]
"""Gradients by the names of inputs."""


class Op(ABC):
    """One call of an op: ``ProjectColumns(a, weight, bias, survivors).run(triton=True)``.

    A subclass, ``class ProjectRows(Op, name="project_rows")``, is a frozen dataclass whose first
    field is a tensor of samples. The kernel that computes it says so itself.
    """

    overload: ClassVar[Any]
    _types: ClassVar[dict[str, object]]
    _pull_back: ClassVar[Any]

    def __init_subclass__(cls, name: str) -> None:
        hints = get_type_hints(cls)
        cls._types = {field: hints[field] for field in cls.__annotations__}
        schema = ", ".join(_SCHEMA[kind].format(field) for field, kind in cls._types.items())
        schema = f"{schema}, bool triton"
        operator = torch.library.custom_op(
            f"planner::{name}",
            lambda *flat: cls._of(flat[:-1])._compute(flat[-1]),
            mutates_args=(),
            schema=f"({schema}) -> Tensor",
        )
        operator.register_fake(lambda *flat: cls._of(flat[:-1]).empty())
        cls.overload = operator._opoverload
        if cls.gradients is not Op.gradients:
            cls._register_gradients(name, schema, operator)

    def run(self, *, triton: bool) -> Tensor:
        """Compute the op, by Triton (interpreted on CPU tensors) or by PyTorch.

        Without a need for gradients it is computed at once, not through PyTorch's dispatcher, whose
        checks take longer than a product of a decoded token. Raises InputError: shapes do not fit,
        or survivors are neither one plan nor one per sample.
        """
        if self._is_plain():
            return self._compute(triton)
        result: Tensor = self.overload(*self.flat(triton))
        return result

    @abstractmethod
    def twin(self) -> Tensor:
        """What the op means, in any floating dtype, to be read and not to be fast.

        Places that a kernel leaves unwritten are NaN.
        """

    @abstractmethod
    def by_pytorch(self) -> Tensor:
        """The result by PyTorch."""

    @abstractmethod
    def empty(self) -> Tensor:
        """A tensor like the result."""

    def suits_triton(self) -> bool:
        """Whether the kernel computes this call; PyTorch takes care of any other."""
        return next(iter(self._fields().values())).dtype in _DTYPES

    def gradients(self, gradient: Tensor, wanted: list[str]) -> Gradients:
        """Gradients of the inputs that are wanted, given that of the result; of few ops."""
        raise NotImplementedError

    def flat(self, triton: bool) -> tuple[Any, ...]:
        """Arguments of the op as PyTorch has it."""
        values: list[Any] = []
        for value in self._fields().values():
            if isinstance(value, Survivors):
                values += [value.units, value.counts, value.lanes, value.width]
            else:
                values.append(value)
        return (*values, triton)

    @classmethod
    def _of(cls, flat: tuple[Any, ...]) -> Self:
        values = iter(flat)
        given: dict[str, Any] = {}
        for name, kind in cls._types.items():
            if kind is Survivors:
                units, counts, lanes, width = (next(values) for _ in range(4))
                given[name] = Survivors(units, counts, width, lanes)
            else:
                given[name] = next(values)
        return cls(**given)

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._types}

    def _compute(self, triton: bool) -> Tensor:
        first, *others = self._fields().values()
        for value in others:
            if isinstance(value, Survivors) and value.plans not in (1, len(first)):
                raise InputError(
                    f"{value.plans} plans do not fit {len(first)} samples: give one, or one each."
                )
        if not triton or not self.suits_triton():
            return self.by_pytorch()
        from planner.kernels.triton.registry import kernel_of

        return kernel_of(type(self))(self)

    def _is_plain(self) -> bool:
        """Whether nothing traces the call or wants gradients of it."""
        tensors = [value for value in self._fields().values() if isinstance(value, Tensor)]
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        return plain and not wanted and not torch.compiler.is_compiling()

    @classmethod
    def _register_gradients(cls, name: str, schema: str, operator: Any) -> None:
        names = [argument.name for argument in cls.overload._schema.arguments]

        def pull_back(gradient: Tensor, needed: list[int], *flat: Any) -> list[Tensor]:
            wanted = [names[index] for index in needed]
            found = cls._of(flat[:-1]).gradients(gradient, wanted)
            return [found[name] for name in wanted]

        torch.library.custom_op(
            f"planner::{name}_backward",
            pull_back,
            mutates_args=(),
            schema=f"(Tensor gradient, int[] needed, {schema}) -> Tensor[]",
        ).register_fake(
            lambda gradient, needed, *flat: [torch.empty_like(flat[index]) for index in needed]
        )
        cls._pull_back = getattr(torch.ops.planner, f"{name}_backward")

        def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            tensors = [value if isinstance(value, Tensor) else None for value in inputs]
            ctx.save_for_backward(*tensors)
            ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

        def pull(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
            inputs = [other if tensor is None else tensor for tensor, other in pairs]
            needed = [index for index, need in enumerate(ctx.needs_input_grad) if need]
            results: list[Tensor | None] = [None] * len(inputs)
            found = cls._pull_back(gradient, needed, *inputs)
            for index, part in zip(needed, found, strict=True):
                results[index] = part
            return tuple(results)

        operator.register_autograd(pull, setup_context=remember)
