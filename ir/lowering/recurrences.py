"""Recurrences: what state-space and linear-attention layers multiply, counted as it runs.

They go through a prompt in chunks of tokens, with products that a trace at one length cannot tell
apart, and the exporter has some of them computed by other formulas. So the decoder runs on shapes
alone at several lengths, and how its FLOPs grow is read off that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from planner.ir.cost.price import operator_flops
from planner.ir.graph import Operator
from planner.ir.lowering.attempts import first_success, sentence
from planner.ir.lowering.capture import Stack, find_stacks, folded
from planner.ir.lowering.counted_flops import CountedFlops
from planner.ir.lowering.raising import Raised

# Lengths at which a chunk is begun and none is full, and at which the longest one is.
_SHORT, _LONGEST = (8, 9, 10), 512

# FLOPs of a layer's recurrence, by tokens.
Flops = Callable[[int], int]


class _CountedLayers(CountedFlops):
    """Also by layer; of those that are alike one runs, and counts for the others too."""

    def __init__(self, stacks: Mapping[str, Stack]) -> None:
        super().__init__()
        self.by_layer: dict[str, int] = {}
        self._begun: dict[str, int] = {}
        self._stacks = {stack.path: stack for stack in stacks.values()}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = getattr(func, "_overloadpacket", None)
        if operator is torch.ops.aten._grouped_mm:
            # PyTorch says its shape in bfloat16 alone.
            rows, weights = args[:2]
            self.total += 2 * rows.numel() * weights.shape[-1]
            return rows.new_empty(rows.shape[0], weights.shape[-1])
        if operator is torch.ops.planner_ir.mark:
            _, role, path = args
            stack, _, index = path.rpartition(".")
            if role == "begin":
                self._begun[path] = self.total
            elif role == "end":
                self.by_layer[path] = self.total - self._begun[path]
            else:
                self.total += self.by_layer[f"{stack}.{self._stacks[stack].kinds[int(index)]}"]
        return super().__torch_dispatch__(func, types, args, kwargs)


def counted_as_run(
    raised: Raised,
    stack: Stack,
    decoder: nn.Module,
    inputs: Callable[[int], dict[str, Any]],
    encoded: int,
) -> Raised:
    """A decoder with FLOPs as the stock code runs them, and a sentence where they are not known.

    Args:
        raised: what it became.
        stack: its layers.
        decoder: on the meta device.
        inputs: its arguments, for so many tokens.
        encoded: tokens of an encoder's output among them.
    """
    stacks = find_stacks(decoder)

    @cache
    def by_layer(tokens: int) -> Mapping[str, int]:
        counter = _CountedLayers(stacks)
        with folded(decoder, stacks), counter:
            decoder(**inputs(tokens))
        return counter.by_layer

    operators, reasons = list(raised.operators), list(raised.reasons)
    places = [
        [n for n, operator in enumerate(operators) if operator.layer == index]
        for index in range(len(stack.kinds))
    ]
    for kind in sorted(set(stack.kinds)):
        path = f"{stack.path}.{kind}"
        layer = _Layer([operators[n] for n in places[kind]], encoded)

        def flops(tokens: int, path: str = path) -> int:
            return by_layer(tokens)[path]

        changed, failure = first_success([partial(layer.as_run, flops)])
        if changed is None:
            recurs = any(operator.kind == "scan" for operator in layer.operators)
            if recurs or isinstance(failure, _OtherGrowth):
                reasons.append(f"{path}: its FLOPs are estimates ({sentence(failure)})")
            continue
        for alike in (places[n] for n, like in enumerate(stack.kinds) if like == kind):
            # One that was called otherwise has been traced by itself.
            if len(alike) == len(changed):
                for place, operator in zip(alike, changed, strict=True):
                    operators[place] = replace(
                        operators[place], kind=operator.kind, attributes=operator.attributes
                    )
    chunks = {operator.get("chunk", 1) for operator in operators} - {1}
    if len(chunks) > 1:
        reasons.append(f"recurrences go in chunks of {chunks}: budgets on prompts are estimates")
    return replace(raised, operators=operators, reasons=reasons)


class _OtherGrowth(Exception):
    """FLOPs that no operator of a layer explains."""


@dataclass(frozen=True)
class _Layer:
    """A layer of a decoder that is given so many tokens of an encoder's output."""

    operators: Sequence[Operator]
    encoded: int

    def as_run(self, flops: Flops) -> list[Operator]:
        """Its operators where all of it costs so much."""
        every, lengths = range(len(self.operators)), (*_SHORT, 4 * _SHORT[-1])
        if all(self._priced(every, tokens) == flops(tokens) for tokens in lengths):
            return list(self.operators)
        for pool in self._pools():
            others = [n for n in every if n not in pool]

            def left(tokens: int, others: Sequence[int] = others) -> int:
                return flops(tokens) - self._priced(others, tokens)

            grown = growth(left)
            if grown is not None:
                result = list(self.operators)
                for n in pool:
                    counts = grown if n == pool[-1] else {"flops_per_row": 0}
                    result[n] = replace(result[n], kind="scan", attributes=()).having(**counts)
                return result
        raise _OtherGrowth("they grow with the tokens in no way that is known")

    def _priced(self, some: Iterable[int], tokens: int) -> int:
        sizes = dict.fromkeys(("query", "context"), tokens) | {"batch": 1}
        sizes |= dict.fromkeys(("encoding", "encoded"), self.encoded)
        return sum(operator_flops(self.operators[n], sizes) for n in some)

    def _pools(self) -> Iterator[list[int]]:
        """Which operators a recurrence may be: the largest scan, all of them, all products of
        activations."""
        scans = [n for n, operator in enumerate(self.operators) if operator.kind == "scan"]
        scans.sort(key=lambda n: self.operators[n].integer("flops_per_row"))
        if scans:
            yield scans[-1:]
            yield scans
        loose = [
            n
            for n, operator in enumerate(self.operators)
            if operator.kind == "matmul"
            and not operator.narrowed_by
            and any("query" in dim.symbols for dim in operator.shape)
        ]
        if loose:
            yield [*loose, *scans]


def growth(flops: Flops) -> dict[str, int] | None:
    """How FLOPs grow with the tokens, as attributes of a scan; None where it is no way known.

    That is a constant, and so much a token, and a chunk and a pair of chunks, or a pair of tokens.
    """
    first, second, third = map(flops, _SHORT)
    # What every two tokens do with each other.
    bend = (third - 2 * second + first) // 2
    per_row = second - first - bend * (_SHORT[0] + _SHORT[1])
    start = first - per_row * _SHORT[0] - bend * _SHORT[0] ** 2

    def beyond(tokens: int) -> int:
        """What a first chunk does not explain."""
        return flops(tokens) - start - per_row * tokens - bend * tokens**2

    low, high = _SHORT[-1], 2 * _SHORT[0]
    while high <= _LONGEST and beyond(high) == 0:
        low, high = high, 2 * high
    found = {"flops": start, "flops_per_row": per_row}
    if bend:
        found |= {"chunk": 1, "flops_per_chunk": 0, "flops_per_chunk_pair": bend}
    if high <= _LONGEST:
        if bend:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if beyond(middle) else (middle, high)
        # One chunk more, and two.
        one, two = beyond(2 * low), beyond(3 * low)
        pair = (two - 2 * one) // 2
        each = one - 3 * pair
        found |= {"flops": start - each - pair, "chunk": low}
        found |= {"flops_per_chunk": each, "flops_per_chunk_pair": pair}
        if beyond(5 * low + 3) != 5 * each + 35 * pair:
            return None
    return found if min(found.values()) >= 0 else None
