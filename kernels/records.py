"""What the kernels are given: a block's stock weights, and the units of it that survive.

Weights are the model's own tensors, `nn.Linear` layout (out, in), never copied. Survivors are
index tensors, so a new plan is new data and recompiles nothing; one row of them serves the whole
batch, or each sample has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from planner.ir.errors import InputError

__all__ = ["AttentionWeights", "KVCache", "MLPWeights", "Norm", "Survivors", "neuron_width"]


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm in front of a block.

    Attributes:
        weight: (hidden,).
        bias: (hidden,) or None; LayerNorm only.
        kind: ``rms``: x / sqrt(mean(x^2) + eps) * (offset + weight) (Zhang and Sennrich, arXiv
            1910.07467, eq. 4); ``layer``: (x - mean) / sqrt(var + eps) * weight + bias (Ba et al.,
            arXiv 1607.06450, eq. 4).
        eps: added under the root.
        offset: added to the weight; 1 in the Gemma family.
    """

    weight: Tensor
    bias: Tensor | None = None
    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0


@dataclass(frozen=True)
class MLPWeights:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where there is no gate.

    Attributes:
        up: (neurons, hidden).
        down: (hidden, neurons).
        gate: (neurons, hidden) or None (Shazeer, arXiv 2002.05202, eq. 6).
        activation: silu, gelu, gelu_pytorch_tanh, quick_gelu or relu.
        up_bias, down_bias, gate_bias: (out,) or None.
        norm: applied to the input first, or None.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    activation: str = "silu"
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    norm: Norm | None = None


@dataclass(frozen=True)
class AttentionWeights:
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245); a unit is one KV group.

    Attributes:
        query: (heads * head_dim, hidden).
        key, value: (kv_heads * head_dim, hidden).
        output: (hidden, heads * head_dim).
        head_dim: lanes per head.
        scale: factor on q k^T; None means 1 / sqrt(head_dim).
        query_bias, key_bias, value_bias, output_bias: (out,) or None.
        query_norm, key_norm: (head_dim,) RMSNorm weights over each head before rotation; both or
            None.
        head_norm_eps, head_norm_offset: of these two.
        norm: applied to the input first, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    head_dim: int
    scale: float | None = None
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    output_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    head_norm_eps: float = 1e-6
    head_norm_offset: float = 0.0
    norm: Norm | None = None

    def __post_init__(self) -> None:
        if (self.query_norm is None) != (self.key_norm is None):
            raise InputError("Queries and keys are normed both or neither; one weight is missing.")

    @property
    def kv_heads(self) -> int:
        """Number of KV groups."""
        return self.key.shape[0] // self.head_dim

    @property
    def group(self) -> int:
        """Query heads per KV group."""
        return self.query.shape[0] // self.key.shape[0]

    @property
    def softmax_scale(self) -> float:
        """The factor on q k^T."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class Survivors:
    """Units of one site that run, for one plan or for one plan per sample.

    A unit is `width` consecutive lanes of the site: one KV group, or `width` neurons. Neurons come
    in units so that a kernel can read weight columns as whole 16-byte vectors; where a plan's
    boundary cuts through a unit, `lanes` says which of its lanes count.

    Attributes:
        units: (plans, slots) int32: surviving units, ascending, then anything.
        counts: (plans,) int32: how many of a row are meant.
        width: lanes per unit.
        lanes: (plans, slots) int32, bit j set if lane j of the unit survives; None: all do.
    """

    units: Tensor
    counts: Tensor
    width: int = 1
    lanes: Tensor | None = None

    @staticmethod
    def of(
        kept: Sequence[Sequence[int]],
        total: int,
        width: int = 1,
        *,
        slots: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Survivors:
        """Build from the surviving lanes of each plan.

        Args:
            kept: per plan, distinct lanes below `total`, in any order.
            total: lanes of the site, a multiple of `width`.
            width: lanes per unit; at most 31 where a unit survives in part.
            slots: entries per row; by default all units, so that every plan has the same shape.
            device: where the tensors go.

        Raises:
            InputError: a lane is out of range or repeated, or the shapes do not fit.
        """
        if width < 1 or total % width:
            raise InputError(f"{total} lanes cannot be divided into units of {width}.")
        slots = total // width if slots is None else slots
        units = torch.zeros(len(kept), slots, dtype=torch.int32)
        lanes = torch.zeros(len(kept), slots, dtype=torch.int32)
        counts = torch.zeros(len(kept), dtype=torch.int32)
        whole = True
        for plan, chosen in enumerate(kept):
            index = torch.tensor(sorted(chosen), dtype=torch.int64)
            if len(index) and (index[0] < 0 or index[-1] >= total or (index.diff() == 0).any()):
                raise InputError(f"Surviving lanes must be distinct and in 0..{total - 1}.")
            present = torch.zeros(total, dtype=torch.int64)
            present[index] = 1
            present = present.view(-1, width)
            alive = present.any(dim=1).nonzero().flatten()
            if len(alive) > slots:
                raise InputError(f"{len(alive)} surviving units do not fit into {slots} slots.")
            counts[plan] = len(alive)
            units[plan, : len(alive)] = alive.int()
            if not present[alive].all():
                if width > 31:
                    raise InputError(f"Units of {width} lanes can only survive whole.")
                whole = False
            if width <= 31:
                bits = (present[alive] << torch.arange(width)).sum(dim=1)
                lanes[plan, : len(alive)] = bits.int()
        return Survivors(
            units.to(device), counts.to(device), width, None if whole else lanes.to(device)
        )

    @property
    def plans(self) -> int:
        """Rows: 1 where the batch shares one plan."""
        return self.units.shape[0]

    @property
    def slots(self) -> int:
        """Entries per row."""
        return self.units.shape[1]

    def require(self, samples: int) -> None:
        """Raise InputError unless there is one plan, or one for each of some samples."""
        if self.plans not in (1, samples):
            raise InputError(
                f"{self.plans} plans do not fit {samples} samples: give one, or one each."
            )

    def kept(self, plan: int) -> Tensor:
        """Surviving lanes of one plan, ascending, int64. Waits for the GPU if they are there."""
        count = int(self.counts[plan])
        units = self.units[plan, :count].long()
        index = (
            units[:, None] * self.width + torch.arange(self.width, device=units.device)
        ).flatten()
        if self.lanes is None:
            return index
        bits = self.lanes[plan, :count, None] >> torch.arange(self.width, device=units.device)
        return index[(bits & 1).bool().flatten()]


def neuron_width(neurons: int) -> int:
    """Lanes per unit for an MLP: 8, a 16-byte vector of half precision, where that divides."""
    return math.gcd(neurons, 8)


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer: ragged in tokens and in heads.

    The row of token t of surviving group s of sample b is ``first[b] + s * room[b] + t``. A
    padded cache (batch, slots, tokens, head_dim) and a packed one without a hole both fit.

    Attributes:
        keys, values: (rows, head_dim).
        first: (batch,) int32.
        room: (batch,) int32: tokens that fit per group.
        lengths: (batch,) int32: tokens stored before the call.
    """

    keys: Tensor
    values: Tensor
    first: Tensor
    room: Tensor
    lengths: Tensor

    @staticmethod
    def empty(
        groups: Sequence[int],
        room: Sequence[int],
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """A packed cache: sample b holds ``groups[b]`` groups of ``room[b]`` tokens, no more."""
        sizes = torch.tensor([g * r for g, r in zip(groups, room, strict=True)], dtype=torch.int64)
        first = sizes.cumsum(0) - sizes
        rows = int(sizes.sum())
        return KVCache(
            torch.empty(rows, head_dim, dtype=dtype, device=device),
            torch.empty(rows, head_dim, dtype=dtype, device=device),
            first.int().to(device),
            torch.tensor(room, dtype=torch.int32, device=device),
            torch.zeros(len(room), dtype=torch.int32, device=device),
        )

    @staticmethod
    def regular(batch: int, slots: int, tokens: int, head_dim: int, like: Tensor) -> KVCache:
        """A cache of equal samples, made on the device of `like` without reading or waiting."""
        store = like.new_empty(2, batch * slots * tokens, head_dim)
        sample = torch.arange(batch, dtype=torch.int32, device=like.device)
        room = torch.full_like(sample, tokens)
        return KVCache(
            store[0], store[1], sample * (slots * tokens), room, torch.zeros_like(sample)
        )

    def rows(self, sample: int, slot: int, tokens: int) -> slice:
        """Rows of the first `tokens` tokens of one group. Reads the tensors."""
        start = int(self.first[sample]) + slot * int(self.room[sample])
        return slice(start, start + tokens)
