"""Exact FLOPs, parameters and cached keys and values of an operator.

Convention: a multiply-add is two operations, attention is counted in full (not halved for
causality), and only products count: linear layers, attention, convolutions, grouped products. It
is what `torch.utils.flop_counter.FlopCounterMode` counts on the executed model with eager
attention, and agrees with it to the last operation. The formulas are in `planner.ir.kinds`.
"""

from __future__ import annotations

from planner.ir.dims import Sizes
from planner.ir.graph import Operator
from planner.ir.kinds import kind_of


def operator_flops(operator: Operator, sizes: Sizes) -> int:
    """FLOPs of one operator when the graph's symbols have the given sizes."""
    formula = kind_of(operator).flops
    return formula(operator, sizes) if formula else 0


def operator_parameters(operator: Operator) -> int:
    """Parameters that an operator adds to the model: 0 where it shares another's (a tied lm_head).

    Parameters that are just added to activations (positions, class tokens) are not counted.
    """
    return 0 if operator.get("tied") else kind_of(operator).weights(operator)


def operator_kv_elements(operator: Operator, sizes: Sizes) -> int:
    """Elements of the keys and values that an operator leaves in the decoder's cache."""
    return kind_of(operator).cached(operator, sizes)
