"""Who computes an operator under a plan: planner's Triton kernels, or PyTorch.

The user says `Kernels.TRITON` or `Kernels.TORCH`, or leaves it to the rules here (`AUTO`).
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from importlib.util import find_spec

import torch

from planner.ir.errors import InputError

__all__ = ["Kernels", "for_plans_as_data", "has_triton"]


class Kernels(StrEnum):
    """What a model's operators run on: ``auto`` decides by operator and device."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"

    @staticmethod
    def of(value: object) -> Kernels:
        """Read a user's choice.

        Raises:
            InputError: it is none of the three, or Triton is not installed.
        """
        try:
            chosen = Kernels(str(value))
        except ValueError:
            names = ", ".join(Kernels)
            raise InputError(f"kernels is {value!r}: choose from {names}") from None
        if chosen is Kernels.TRITON and not has_triton():
            raise InputError("kernels='triton' needs Triton, which is not installed here")
        return chosen


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not made for every platform."""
    return find_spec("triton") is not None


def for_plans_as_data(kernels: Kernels, device: torch.device) -> bool:
    """Whether Triton computes an op whose survivors are tensors that may change between calls.

    PyTorch reads them on the host, so on a GPU every op would wait for the device; the kernels read
    them where they run. On a CPU Triton is an interpreter, for tests alone.
    """
    if kernels is Kernels.AUTO:
        return device.type == "cuda" and has_triton()
    return kernels is Kernels.TRITON
