"""The decoder of a model, captured and raised, and the output embedding after it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from torch import nn

from planner.ir.dims import Dim
from planner.ir.graph import Operator
from planner.ir.lowering.aten import opname
from planner.ir.lowering.attempts import NotLowered, first_success, sentence
from planner.ir.lowering.capture import Captured, capture, path_of
from planner.ir.lowering.describing import Markers
from planner.ir.lowering.example_inputs import decoder_inputs, token_markers
from planner.ir.lowering.raising import Raised, Surroundings, raise_operators
from planner.ir.lowering.recurrences import counted_as_run


def decoder_of(model: Any) -> Any:
    """The decoder of a transformers model; that inside it, where it is an encoder beside one."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is model or not decoder.config.is_encoder_decoder:
        return decoder
    return decoder_of(decoder)


def head_of(model: Any) -> Any:
    """The output embedding of a transformers model, which its decoder may have; None without."""
    owners = (model, decoder_of(model))
    heads = (o.get_output_embeddings() for o in owners if hasattr(o, "get_output_embeddings"))
    return next((head for head in heads if head is not None), None)


def lower_decoder(model: Any, embeddings: nn.Module) -> tuple[Raised, int]:
    """The decoder and, where there is one, the output embedding; and the number of layers.

    The model is on the meta device; embeddings are those of the decoder's tokens. NotLowered where
    the decoder cannot be captured.
    """
    decoder = decoder_of(model)
    width = int(embeddings.weight.shape[-1])  # type: ignore[index]
    markers = token_markers(decoder)

    head = head_of(model)
    accepted = inspect.signature(decoder.forward).parameters
    # With an output embedding of its own it computes the last token's logits, as in generation.
    last = {}
    if head is not None and path_of(decoder, head) and "logits_to_keep" in accepted:
        last["logits_to_keep"] = 1

    def candidates(tokens: int) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
        for inputs, activations in decoder_inputs(decoder, width, tokens, markers.encoded):
            yield inputs | last, activations

    def attempt(
        number: int, inputs: dict[str, Any], activations: tuple[str, ...]
    ) -> tuple[Captured, Markers, int]:
        captured = capture(decoder, inputs, activations, markers.tokens)
        # Tokens alone enter most decoders.
        return captured, markers if len(activations) > 1 else Markers(markers.tokens), number

    attempts = enumerate(candidates(markers.tokens))
    found, failure = first_success(partial(attempt, n, *candidate) for n, candidate in attempts)
    if found is None:
        raise NotLowered(f"its decoder cannot be captured ({sentence(failure)})")
    captured, markers, number = found

    def inputs(tokens: int) -> dict[str, Any]:
        """For so many tokens, as they are in generation."""
        taken, _ = next(islice(candidates(tokens), number, None))
        return taken | {"use_cache": True}

    main, layers = _main_stack(captured)
    path = path_of(model, decoder)
    prefix = path + "." if path else ""
    around = Surroundings(prefix, lambda module: "decoder", "batch", markers, main)
    raised = raise_operators(captured, around)
    if main is not None:
        raised = counted_as_run(raised, captured.stacks[main], decoder, inputs, markers.encoded)
    raised = replace(raised, operators=_with_windows(model, raised.operators))
    return _with_head(model, raised, embeddings), layers


def _main_stack(captured: Captured) -> tuple[str | None, int]:
    """Path of the longest stack that runs, and its number of layers."""
    run = {
        str(node.args[2]).rpartition(".")[0]
        for node in captured.graph.nodes
        if node.op == "call_function" and opname(node) == "mark"
    }
    stacks = [stack for stack in captured.stacks.values() if stack.path in run]
    main = max(stacks, key=lambda stack: len(stack.kinds), default=None)
    return (main.path, len(main.kinds)) if main else (None, 0)


def _with_windows(model: Any, operators: list[Operator]) -> list[Operator]:
    """Note on each attention how many tokens its cache is limited to, where it is."""
    from transformers import DynamicCache

    try:
        caches = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return operators
    windows = {i: getattr(c, "sliding_window", None) or 0 for i, c in enumerate(caches)}
    return [
        operator.having(window=int(windows[operator.layer]))
        if operator.kind == "attention"
        and isinstance(operator["keys"], Dim)
        and operator.layer is not None
        and windows.get(operator.layer)
        else operator
        for operator in operators
    ]


def _with_head(model: Any, raised: Raised, embeddings: nn.Module) -> Raised:
    """The decoder with the output embedding as its last operator, as it runs in ``generate()``."""
    head = head_of(model)
    if getattr(head, "weight", None) is None:
        return raised
    path = path_of(model, head)
    operators, source = raised.operators, (*raised.outputs, raised.operators[-1].name)[0]
    for position, operator in enumerate(operators):
        if path and operator.module == path and operator.kind == "linear":
            # The decoder's own forward ends in it. What follows, a scaling of the logits say,
            # goes with it, and what comes before it is of as many tokens as have logits.
            operators, source = _last_alone(operators[:position]), operator.inputs[0]
            break
    rows, columns = (int(size) for size in head.weight.shape)
    operator = Operator(
        name=path or "lm_head",
        kind="linear",
        inputs=(source,),
        # Generation needs the logits of the last token alone.
        shape=(Dim.of("batch"), Dim(1), Dim(rows)),
        module=path or "lm_head",
        part="head",
    ).having(**{"in": columns, "out": rows, "bias": int(getattr(head, "bias", None) is not None)})
    if head.weight is embeddings.weight:
        operator = operator.having(tied=1)
    return replace(raised, operators=[*operators, operator])


def _last_alone(operators: Sequence[Operator]) -> list[Operator]:
    """Operators of a decoder, of which those that its last token alone goes through are the
    head's."""
    layers = [n for n, operator in enumerate(operators) if operator.layer is not None]
    behind = max(layers, default=len(operators))
    return [
        replace(operator, part="head")
        if n > behind and all(dim.is_constant for dim in operator.shape[1:])
        else operator
        for n, operator in enumerate(operators)
    ]
