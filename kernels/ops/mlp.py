"""An MLP block over surviving neurons."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from planner.kernels.ops.project_columns import project_columns
from planner.kernels.ops.project_rows import ProjectRows
from planner.kernels.survivors import Survivors

__all__ = ["MLPWeights", "mlp"]


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where there is no gate.

    Attributes:
        up: (neurons, hidden); the model's own, as are all.
        down: (hidden, neurons).
        gate: (neurons, hidden) or None (Shazeer, arXiv 2002.05202, eq. 6).
        activation: a key of `planner.kernels.ops.project_rows.ACTIVATIONS`.
        up_bias, down_bias, gate_bias: (out,) or None.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    activation: str = "silu"
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_bias: Tensor | None = None


def mlp(hidden: Tensor, weights: MLPWeights, survivors: Survivors, *, triton: bool) -> Tensor:
    """The block's output, (batch, ..., hidden), computed from surviving neurons alone.

    Args:
        hidden: (batch, ..., hidden).
        weights: the block's, read in place.
        survivors: surviving neurons; one plan, or one per sample.
        triton: whether Triton computes it, or PyTorch.

    Raises:
        InputError: neither one plan nor as many as samples, or shapes that do not fit.
    """
    up, gate = (weights.up, weights.up_bias), (weights.gate, weights.gate_bias)
    inner = ProjectRows(hidden, *up, *gate, weights.activation, True, survivors)
    return project_columns(
        inner.run(triton=triton), weights.down, weights.down_bias, survivors, triton=triton
    )
