"""Policies by which a KV cache evicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil, floor
from random import Random
from typing import ClassVar

from typing_extensions import override

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.planning.selectors.arguments import Arguments, Layer, Part, Share
from planner.planning.selectors.selector import Needs, Selector


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


class AnswerPolicy(KVPolicy):
    """Stores prompts whole, in later turns as well, and of an answer some tokens, from layer k on.

    A decoded token attends to itself in any case.
    """

    k: int

    @property
    @override
    def layer(self) -> int:
        return self.k

    @abstractmethod
    def most(self, decoded: int) -> int:
        """How many of so many decoded tokens are stored at most."""

    @override
    def kept(self, prompt: int, new: int = 0, image: int = 0) -> int:
        return prompt + self.most(new)


@dataclass(frozen=True)
class AnswerRule(AnswerPolicy):
    """Store a share of an answer by a rule that looks at nothing: baselines of trained ones.

    ``alternate`` stores tokens at even distances, of a share of 0.5 every other one; ``random`` one
    at random of each such distance; ``recent`` the latest, and forgets those before. The first two
    are "Structure" and "Random" in Table 3 of Dynamic-LLaVA (arXiv 2412.00876).
    """

    name = "answer"
    leading = "rule"
    rule: str
    share: Part = 0.5  # of the answer's tokens
    k: Layer = 2  # the first whose cache leaves tokens out
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = ("alternate", "random", "recent")
        self.check("rule", self.rule in rules, "alternate, random or recent")

    def _turn(self, token: int) -> int:
        # A share that was given as a quotient means the whole number that it came of.
        return floor(token * self.share + _ROUNDING)

    def stores(self, token: int) -> bool:
        """Whether a token of the answer, counted from 0, is stored when it is decoded."""
        if self.rule == "recent":
            return True
        turn = self._turn(token)
        first = ceil(turn / self.share - _ROUNDING)
        if self.rule == "alternate":
            return token == first
        last = ceil((turn + 1) / self.share - _ROUNDING) - 1
        return token == Random(f"{self.seed}-{turn}").randint(first, last)

    @override
    def most(self, decoded: int) -> int:
        return ceil(decoded * self.share - _ROUNDING)


_ROUNDING = 1e-9


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


def check_policy(policy: KVPolicy, graph: Graph) -> None:
    """Raise InputError where a KV policy governs no layer of a model, or one that evicts itself."""
    if policy.layer >= graph.layers:
        raise InputError(
            f"{policy} begins at decoder layer {policy.layer}, counted from 0, and '{graph.name}' "
            f"has {graph.layers} layers"
        )
    for operator in graph:
        if operator.part == "decoder" and operator.get("window"):
            raise InputError(
                f"{policy} cannot be combined with the sliding window of layer {operator.layer} of "
                f"'{graph.name}', which evicts by itself"
            )


def check_beside(policy: KVPolicy, selector: Selector, name: str) -> None:
    """Raise InputError where a policy hides what a selector, of that name, looks at."""
    # Marks are of text that rates image tokens.
    if policy.hides_images and (selector.scores_by_attention or Needs.MARKS in selector.needs):
        raise InputError(
            f"{name} ranks image tokens by the attention of the text, from which {policy} hides "
            f"them; take another selector"
        )
