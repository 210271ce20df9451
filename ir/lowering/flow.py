"""Flow: which nodes of a captured graph carry activations, and what they read besides.

Masks, positions and weights are in the captured graph too; the Graph is of the activations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import SymInt, Tensor, fx

from planner.ir.lowering.aten import HEAVY, VIEWS, opname
from planner.ir.lowering.capture import WRAPPED, Captured
from planner.ir.lowering.rewrites import REPLACED


def is_light(node: fx.Node) -> bool:
    """Whether a node does elementwise work, or none."""
    name = opname(node)
    return name not in HEAVY and name not in ("mark", "embedding")


@dataclass(frozen=True)
class Flow:
    """The activations of one captured module."""

    captured: Captured

    @cached_property
    def live(self) -> frozenset[fx.Node]:
        """Nodes that activations flow through on their way to the output or to any product.

        Stock code computes some for nothing, such as a vision tower's pooling head, and some that
        masks are made of: which keys a query is to meet. Their products run, and cost.
        """
        graph = self.captured.graph
        reached: set[fx.Node] = set()
        for node in graph.nodes:
            entering = node.op == "placeholder" and node.name in self.captured.inputs
            # Learned queries enter a stack without coming from the pixels.
            entering |= node.op == "call_function" and opname(node) == "mark"
            # Sizes that are read off an activation are no activations, nor is what has no element.
            value = node.meta.get("val")
            if isinstance(value, SymInt | int) or (isinstance(value, Tensor) and not value.numel()):
                continue
            if entering or any(n in reached for n in node.all_input_nodes):
                reached.add(node)
        needed: set[fx.Node] = set()
        for node in reversed(list(graph.nodes)):
            is_used = node.op == "output" or any(user in needed for user in node.users)
            runs = opname(node) in HEAVY and not node.meta.get(REPLACED)
            if is_used or (node in reached and runs):
                needed.add(node)
        positions = {n for n in needed if n.op == "call_function" and opname(n) in HEAVY}
        return frozenset((reached & needed) | positions)

    @cached_property
    def calls(self) -> list[fx.Node]:
        """Live nodes that compute something, in order."""
        graph = self.captured.graph
        return [node for node in graph.nodes if node in self.live and node.op == "call_function"]

    @staticmethod
    def module(node: fx.Node) -> tuple[str, str]:
        """(key of the innermost module call a node belongs to, its path)."""
        stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        if not stack:
            return "", ""
        key, (path, _) = list(stack.items())[-1]
        return key, re.sub(rf"^{WRAPPED}\.?", "", path)

    def weight(self, node: fx.Node) -> fx.Node | None:
        """The parameter a product reads, None where both factors are activations."""
        for argument in node.all_input_nodes:
            origin = argument
            while (
                origin.op == "call_function"
                and opname(origin) in VIEWS
                and origin not in self.live
                and isinstance(origin.args[0], fx.Node)
            ):
                origin = origin.args[0]
            if origin.op == "placeholder" and origin.name in self.captured.parameters:
                value = origin.meta.get("val")
                if isinstance(value, Tensor) and value.ndim >= 2:
                    return origin
        return None

    def owner(self, weight: fx.Node) -> str:
        """Path of the module that a parameter belongs to."""
        return self.captured.parameters[weight.name].rpartition(".")[0]

    @cached_property
    def linears(self) -> dict[fx.Node, str]:
        """Linear node -> path of the module that owns its weight."""
        weights = {node: self.weight(node) for node in self.calls if opname(node) == "linear"}
        return {node: self.owner(weight) for node, weight in weights.items() if weight is not None}
