"""The decoder of a model, captured and raised, and the output embedding after it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
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


def decoder_of(model: Any) -> Any:
    """The decoder of a transformers model; that inside it, where it is an encoder beside one."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is model or not decoder.config.is_encoder_decoder:
        return decoder
    return decoder_of(decoder)


def lower_decoder(model: Any, embeddings: nn.Module) -> tuple[Raised, int]:
    """The decoder and, where there is one, the output embedding; and the number of layers.

    The model is on the meta device; embeddings are those of the decoder's tokens. NotLowered where
    the decoder cannot be captured.
    """
    decoder = decoder_of(model)
    width = int(embeddings.weight.shape[-1])  # type: ignore[index]
    markers = token_markers(decoder)

    def attempt(inputs: dict[str, Any], activations: tuple[str, ...]) -> tuple[Captured, Markers]:
        captured = capture(decoder, inputs, activations, markers.tokens)
        # Tokens alone enter most decoders.
        return captured, markers if len(activations) > 1 else Markers(markers.tokens)

    candidates = decoder_inputs(decoder, width, markers.tokens, markers.encoded)
    found, failure = first_success(partial(attempt, *candidate) for candidate in candidates)
    if found is None:
        raise NotLowered(f"its decoder cannot be captured ({sentence(failure)})")
    captured, markers = found
    main, layers = _main_stack(captured)
    path = path_of(model, decoder)
    prefix = path + "." if path else ""
    around = Surroundings(prefix, lambda module: "decoder", "batch", markers, main)
    raised = raise_operators(captured, around)
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
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        return raised
    path = path_of(model, head)
    operators, source = raised.operators, (*raised.outputs, raised.operators[-1].name)[0]
    for position, operator in enumerate(operators):
        if path and operator.module == path and operator.kind == "linear":
            # The decoder's own forward ends in it. What follows, a scaling of the logits say,
            # goes with it.
            operators, source = operators[:position], operator.inputs[0]
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
