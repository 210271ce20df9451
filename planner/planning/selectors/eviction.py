"""Policies by which a KV cache evicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.planning.selectors.arguments import Arguments


class KVPolicy(Arguments, ABC):
    """Which entries a KV cache holds; a frozen dataclass whose fields are its arguments.

    Attributes:
        name: how users call it.
        scores_by_attention: whether it computes the attention of all queries once more.
    """

    scores_by_attention: ClassVar[bool] = False

    @property
    def layer(self) -> int:
        """The first layer whose cache it governs."""
        return 0

    @abstractmethod
    def kept(self, prompt: int, new: int = 0) -> int:
        """Entries in the cache of each head after the prompt and `new` decoded tokens, at most."""

    def parameters(self, width: int) -> int:
        """Of what decides, beside a decoder of this width."""
        return 0


@dataclass(frozen=True)
class H2O(KVPolicy):
    """Heavy-hitter oracle: per head, keep what received most attention and what came last.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
    Models" (arXiv 2306.14048), Algorithm 1. Both budgets are shares of the prompt's length, fixed
    from then on. Attention accumulates over the prompt and every decoded token, and evicted entries
    are gone. With grouped queries the heads of a group share their keys, so their attention is
    summed. The reference sums scores over a batch of one; here every sample has its own.
    """

    name = "h2o"
    scores_by_attention = True
    heavy: float = 0.1  # share of the prompt kept as heavy hitters
    recent: float = 0.1  # share of the prompt kept as most recent; at least the newest token

    def __post_init__(self) -> None:
        self.check("heavy", 0 <= self.heavy <= 1, "a share from 0 to 1")
        self.check("recent", 0 <= self.recent <= 1, "a share from 0 to 1")

    def budgets(self, prompt: int) -> tuple[int, int]:
        """Heavy hitters and recent tokens kept after a prompt of that many tokens."""
        return int(prompt * self.heavy), max(1, int(prompt * self.recent))

    @override
    def kept(self, prompt: int, new: int = 0) -> int:
        return min(prompt + new, sum(self.budgets(prompt)))


def check_layer(policy: KVPolicy, graph: Graph) -> None:
    """Raise InputError where a KV policy governs no layer of a model."""
    if policy.layer >= graph.layers:
        raise InputError(
            f"{policy} begins at decoder layer {policy.layer}, counted from 0, and '{graph.name}' "
            f"has {graph.layers} layers"
        )
