"""Policies by which a KV cache evicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.planning.selectors.arguments import Arguments, Share


class KVPolicy(Arguments, ABC):
    """Which entries a KV cache holds; a frozen dataclass whose fields are its arguments."""

    # Whether it computes the attention of all queries once more.
    scores_by_attention: ClassVar[bool] = False
    # Whether text attends to no image, and so cannot rank its tokens.
    hides_images: ClassVar[bool] = False

    @property
    def layer(self) -> int:
        """The first layer whose cache it governs."""
        return 0

    @abstractmethod
    def kept(self, prompt: int, new: int = 0, image: int = 0) -> int:
        """Entries in the cache of each head after the prompt and `new` decoded tokens, at most.

        `image`: how many of the prompt's tokens are an image's.
        """

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
    heavy: Share = 0.1  # of the prompt kept as heavy hitters
    recent: Share = 0.1  # of the prompt kept as most recent; at least the newest token

    def budgets(self, prompt: int) -> tuple[int, int]:
        """Heavy hitters and recent tokens kept after a prompt of that many tokens."""
        return int(prompt * self.heavy), max(1, int(prompt * self.recent))

    @override
    def kept(self, prompt: int, new: int = 0, image: int = 0) -> int:
        return min(prompt + new, sum(self.budgets(prompt)))


@dataclass(frozen=True)
class VoCo(KVPolicy):
    """Let VoCo tokens stand for the image: what comes behind them sees nothing before the first.

    A model trained for it begins its prompts with the image and a few tokens of its own, which
    attend to all of it as usual; every later token attends from the first of these on. So once the
    prompt is read, the image and all else before them is taken out of the cache. Position ids stay.
    Ye et al., "VoCo-LLaMA: Towards Vision Compression with Large Language Models" (arXiv
    2406.12275), and the released code, which hides those entries and stores them all the same.

    The prompt itself costs what it costs the base model. Text before the image is priced as if it
    were stored. `training/configs/voco.yaml` trains a model; its config has ``voco_token_id``.
    """

    name = "voco"
    hides_images = True

    @override
    def kept(self, prompt: int, new: int = 0, image: int = 0) -> int:
        return prompt - image + new


def check_layer(policy: KVPolicy, graph: Graph) -> None:
    """Raise InputError where a KV policy governs no layer of a model."""
    if policy.layer >= graph.layers:
        raise InputError(
            f"{policy} begins at decoder layer {policy.layer}, counted from 0, and '{graph.name}' "
            f"has {graph.layers} layers"
        )
