"""Tokens of answers that a trained predictor says are worth keeping, as they are decoded."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from planner.ir.errors import InputError
from planner.models.running.attention_blocks import named
from planner.models.tokens.answer_cache import AnswerTally
from planner.models.tokens.kept_tokens import Kept, select_rows
from planner.models.tokens.predictors import OutputPredictor, load_predictors
from planner.planning.selectors import AnswerPolicy, AnswerRule, AnswerTokens

if TYPE_CHECKING:
    from planner.models.running.cache_layers import Cached
    from planner.models.running.forward_pass import Call


@dataclass(frozen=True, eq=False)
class _Decoding:
    """An answer that is decoded without a cache: every pass repeats the prompt, and goes on."""

    model: weakref.ref[nn.Module]
    prompt: Tensor  # ids, (batch, tokens)
    length: int  # of the last pass


_decoding: ContextVar[_Decoding | None] = ContextVar("planner_decoding", default=None)


class AnswerStage:
    """Decides which tokens of an answer go on, for the layers behind a KV policy's first.

    `places`: carries flags of the model's tokens over to those of the decoder, see `TokenStages`.

    Raises InputError: a policy's folder holds no output predictor for this model.
    """

    def __init__(
        self,
        model: nn.Module,
        policies: set[AnswerPolicy],
        places: Callable[[Tensor, bool], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.arguments: dict[str, Any] = {}  # of the model in this pass
        self._places = places or (lambda known, value: known)
        self._predictors = {
            policy: _output_predictor(policy, model)
            for policy in policies
            if isinstance(policy, AnswerTokens)
        }

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the model was called with, or the part of it that a pass began with."""
        self.arguments = named(module, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, call: Call) -> None:
        """Find the answer so far in a pass without a cache, before layer 0.

        It begins where the first of the passes ended that each repeat the one before, and one
        token more. In any other pass all tokens are a prompt's.
        """
        ids, before = self.arguments.get("input_ids"), _decoding.get()
        if call.cache is not None or ids is None:
            _decoding.set(None)
            return
        length = ids.shape[1]
        if (
            before is None
            or before.model() is not self.model
            or before.length + 1 != length
            or not torch.equal(before.prompt, ids[:, : before.prompt.shape[1]])
        ):
            _decoding.set(_Decoding(weakref.ref(self.model), ids, length))
            return
        _decoding.set(replace(before, length=length))
        answer = torch.zeros_like(ids, dtype=torch.bool)
        answer[:, before.prompt.shape[1] : -1] = True
        call.answer = self._places(answer, False).to(call.device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def decide(
        self,
        call: Call,
        policy: AnswerPolicy,
        rows: Tensor | None,
        hidden: Tensor,
        tally: AnswerTally | None,
    ) -> None:
        """Decide for a group's batch rows (None: all), before the policy's first layer.

        What a decoded token's keys and values are stored of, or what is left of a pass without a
        cache, is noted in the call. Prompts, and turns of several tokens, are kept whole.

        `hidden`: what is about to enter the layer, shape (batch, tokens, width). `tally`: of the
        group in its cache; None without one.
        """
        is_recent = isinstance(policy, AnswerRule) and policy.rule == "recent"
        if call.cache is not None and call.tokens == 1 and call.past:
            if tally is None:
                raise InputError(f"{policy}: layer {policy.k} of this model caches no keys")
            tokens = torch.full((1, 1), tally.decoded, device=hidden.device)
            worth = self._worth(policy, select_rows(hidden, rows, 0), tokens)
            wanted = tally.count(worth[:, 0])
            if call.stored is None:
                call.stored = torch.ones(call.batch, dtype=torch.bool, device=hidden.device)
            call.stored[slice(None) if rows is None else rows] = wanted
        elif call.answer is not None and is_recent:
            raise InputError(f"{policy} forgets tokens that a cache holds: leave use_cache on")
        elif call.answer is not None:
            answer = select_rows(call.answer, rows, 0)
            tokens = (answer.cumsum(1) - 1).clamp(min=0)
            wanted = self._worth(policy, select_rows(hidden, rows, 0), tokens)
            if isinstance(policy, AnswerTokens) and policy.max < 1:
                tally, places = AnswerTally(policy), answer.any(0).nonzero().flatten()
                for place in places:
                    wanted[:, place] = tally.count(wanted[:, place])
            if call.left is None:
                call.left = call.new_valid()
            call.left[slice(None) if rows is None else rows] &= wanted | ~answer
            call.kept = Kept.of(call.left)

    def _worth(self, policy: AnswerPolicy, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Whether tokens are worth keeping, shape (rows, tokens), bool.

        `tokens`, shape (rows or 1, tokens), are their numbers in the answer, from 0.
        """
        if isinstance(policy, AnswerRule):
            stored = [policy.stores(token) for token in range(int(tokens.max()) + 1)]
            by_rule = torch.tensor(stored, device=hidden.device)[tokens]
            return by_rule.expand(len(hidden), -1)
        assert isinstance(policy, AnswerTokens)
        predictor = self._predictors[policy].to(hidden.device, hidden.dtype)
        logits: Tensor = predictor(hidden)
        return logits[..., 0] > logits[..., 1]


def tally_of(cached: Cached | None, group: int) -> AnswerTally | None:
    """That of a group in a layer's cache; None without a cache."""
    keeper = None if cached is None or not hasattr(cached, "parts") else cached.parts[group].keeper
    return keeper if isinstance(keeper, AnswerTally) else None


def _output_predictor(policy: AnswerTokens, model: Any) -> OutputPredictor:
    width = model.config.get_text_config(decoder=True).hidden_size
    predictor = load_predictors(policy.folder, width).output
    if predictor is None:
        raise InputError(f"the predictors in '{policy.folder}' have none of answer tokens")
    return predictor
