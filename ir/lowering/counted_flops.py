"""Counting FLOPs as they run, every product of matrices, whatever computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override


def _grouped(a: Tensor, b: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    """Rows (rows, in) with the matrices of their groups, (groups, in, out)."""
    return 2 * a.numel() * b.shape[-1]


# PyTorch's own counter leaves out attention as it runs on a CPU, experts, and sums in place.
_FORMULAS: Mapping[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    torch.ops.aten._grouped_mm: _grouped,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
}
# Defined by transformers as it is imported.
_GROUPED = "transformers::grouped_mm_fallback"


class CountedFlops(TorchDispatchMode):
    """Counts as `torch.utils.flop_counter.FlopCounterMode`, but more, and without global hooks.

    Attributes:
        total: FLOPs so far.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = getattr(func, "_overloadpacket", func)
        formula = _FORMULAS.get(operator)
        if formula is None and isinstance(func, torch._ops.OpOverload):
            formula = _grouped if func._schema.name == _GROUPED else None
            if formula is None:
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result
