"""Assignment: which features of which linears belong to which lane of a site."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx

from planner.ir.graph import Binding, Block
from planner.ir.lowering.aten import opname
from planner.ir.lowering.lanes import Label, TracedLayer, affine_blocks


class Assignment:
    """Lane number of every feature of every source, filled role by role.

    `layer` is the one that the site is in, `count` the number of lanes.
    """

    def __init__(self, layer: TracedLayer, count: int) -> None:
        self.layer, self.count = layer, count
        self.roles: list[tuple[fx.Node, list[list[int]]]] = []
        self._tables: dict[fx.Node, Tensor | None] = {}

    def add(self, source: fx.Node, features: list[list[int]]) -> None:
        """Features of each lane in one role (q, k, v, gate, ...) of a source."""
        if all(lane == features[0] for lane in features) and self.count > 1:
            return  # shared by all lanes: not narrowed
        if not any(s is source and f == features for s, f in self.roles):
            self.roles.append((source, features))

    def add_heads(self, attention: fx.Node, lane_of_head: Tensor) -> None:
        """Lane of every head of an attention, whose output is a source as well."""
        self._tables[attention] = lane_of_head

    @property
    def sources(self) -> list[fx.Node]:
        """Linears with features in lanes."""
        return list(dict.fromkeys(source for source, _ in self.roles))

    def lane_of(self, source: fx.Node) -> Tensor | None:
        """Lane of each feature of a source; None unless each belongs to exactly one."""
        if source not in self._tables:
            self._tables[source] = self._lane_of(source)
        return self._tables[source]

    def _lane_of(self, source: fx.Node) -> Tensor | None:
        lane_of = np.full(int(source.meta["val"].shape[-1]), -1, dtype=np.int32)
        for owner, features in self.roles:
            if owner is source:
                numbers = np.concatenate([np.asarray(lane, dtype=np.int64) for lane in features])
                lanes = np.repeat(np.arange(self.count), [len(lane) for lane in features])
                known = lane_of[numbers]
                lane_of[numbers] = lanes
                if ((known != -1) & (known != lanes)).any() or (lane_of[numbers] != lanes).any():
                    return None
        return None if (lane_of == -1).any() else torch.from_numpy(lane_of)

    # -- bindings ----------------------------------------------------------------------------

    def bindings(self) -> list[Binding] | None:
        """One binding per module, None where a layout follows no rule: a module that runs twice
        must have one layout."""
        bindings: dict[str, Binding] = {}
        for source in self.sources:
            blocks = self._blocks(source)
            if blocks is None or self.lane_of(source) is None:
                return None
            binding = Binding(self.layer.flow.linears[source], "out", blocks)
            if bindings.setdefault(binding.module, binding) != binding:
                return None
        return list(bindings.values())

    def _blocks(self, source: fx.Node) -> tuple[Block, ...] | None:
        """Layout of a source's features, role by role, overlapping roles merged."""
        merged: list[set[int]] = [set() for _ in range(self.count)]
        blocks: list[Block] = []
        for owner, features in self.roles:
            if owner is not source:
                continue
            fresh = [sorted(set(lane) - merged[i]) for i, lane in enumerate(features)]
            if not any(fresh):
                continue
            found = affine_blocks(fresh)
            if found is None:
                return None
            blocks.extend(found)
            for i, lane in enumerate(fresh):
                merged[i].update(lane)
        return tuple(blocks)

    # -- values between the linears ----------------------------------------------------------

    def _known(self) -> Mapping[fx.Node, Tensor]:
        """Lanes of the features of every source."""
        for source in self.sources:
            self.lane_of(source)
        return {source: table for source, table in self._tables.items() if table is not None}

    def _lanes(self, label: Label, table: Tensor) -> Tensor:
        """Lane of each element of a value for one token, -1 where the label does not reach."""
        index = label.index.real.int() if label.index.is_complex() else label.index
        for axis, size in enumerate(index.shape):
            if size == self.layer.tokens:
                index = index.narrow(axis, 0, 1)
        return torch.where(index < 0, -1, table[index.clamp(min=0).long()])

    def is_separable(self) -> bool:
        """Whether no reduction (a norm, say) mixes elements of different lanes."""
        known = self._known()
        for label, axes in self.layer.tracer.mixed:
            if label.source in known:
                lanes = self._lanes(label, known[label.source])
                if bool((lanes.amin(dim=axes) != lanes.amax(dim=axes)).any()):
                    return False
        return True

    def narrowed(self, kind: str) -> dict[fx.Node, tuple[tuple[str, str], ...]]:
        """Which operators shrink with a site of this kind, and along which dimension."""
        known = self._known()
        narrowed = {}
        for node in self.layer.nodes:
            labels = [label for label in self.layer.labels(node) if label.source in known]
            value = node.meta.get("val")
            if not labels or not isinstance(value, Tensor) or isinstance(labels[0].index, tuple):
                continue
            lanes = self._lanes(labels[0], known[labels[0].source])
            for label in labels[1:]:
                # Joined values come from several sources, each from one of them.
                lanes = torch.maximum(lanes, self._lanes(label, known[label.source]))
            axes = [axis for axis in range(lanes.ndim) if _varies(lanes, axis)]
            if len(axes) != 1:
                continue
            # The samples' dimension is always first in the Graph, whether or not the node has one.
            dimension = axes[0] if value.shape[0] == 1 else axes[0] + 1
            pairs = [(f"shape.{dimension}", kind)]
            if opname(node) == "linear" and node in known:
                pairs.append(("out", kind))
            narrowed[node] = tuple(pairs)
        return narrowed


def _varies(lanes: Tensor, axis: int) -> bool:
    """Whether lanes differ along an axis; elements of no lane (-1) are the same for all."""
    if lanes.shape[axis] < 2 or not lanes.numel():
        return False
    highest = lanes.amax(axis)
    lowest = torch.where(lanes < 0, highest.unsqueeze(axis), lanes).amin(axis)
    return bool((highest != lowest).any())
