"""Lowering: from a model, or just its config, to a Graph.

A model has up to three captured parts: the vision side (encoder and projector, through the model's
own ``get_image_features``), the decoder, and the output embedding. Everything is found by
transformers' accessors and by structure; no architecture is named.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import io
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Operator
from planner.ir.graph_text import fingerprint
from planner.ir.lowering.aten import opname
from planner.ir.lowering.capture import Captured, build_on_meta, capture
from planner.ir.lowering.example_inputs import decoder_inputs, token_marker, vision_inputs
from planner.ir.lowering.raising import Raised, Surroundings, raise_operators
from planner.ir.lowering.sharing import without_shared
from planner.ir.verify import verify

__all__ = ["Lowered", "NotLowered", "lower", "lower_config", "lower_model"]


class NotLowered(InputError):
    """A model that cannot be lowered, and why."""


@dataclass(frozen=True)
class Lowered:
    """A Graph, and what was left out of it and why (one sentence each)."""

    graph: Graph
    notes: tuple[str, ...] = ()


@contextmanager
def _quiet() -> Iterator[None]:
    """Failed attempts are expected while candidates are tried: keep torch's logs out of sight."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        logging.disable(previous)


def _sentence(error: BaseException) -> str:
    """The first line of an error message, short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _build(config: Any, model_class: Any = None) -> tuple[nn.Module, list[str]]:
    """The model on the meta device; its text model alone where the whole cannot be built."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    if model_class is not None:

        class _Exactly:
            from_config = staticmethod(model_class._from_config)

        return build_on_meta(copy.deepcopy(config), _Exactly), []
    if type(config) in AutoModelForImageTextToText._model_mapping:
        candidates: list[tuple[Any, Any]] = [(config, AutoModelForImageTextToText)]
    else:
        candidates = [(config, AutoModelForCausalLM)]
    try:
        text = config.get_text_config(decoder=True)
    except Exception:
        text = config
    if text is not config:
        candidates += [(text, AutoModelForCausalLM), (text, AutoModel)]
    errors: list[str] = []
    for candidate, auto in candidates:
        try:
            model = build_on_meta(copy.deepcopy(candidate), auto)
        except Exception as error:
            errors.append(_sentence(error))
        else:
            notes = (
                [f"text model only; the whole could not be built ({errors[0]})"] if errors else []
            )
            return model, notes
    raise NotLowered(f"'{config.model_type}' cannot be built from its config ({errors[0]})")


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next((path for path, child in model.named_modules() if child is module), "")


class _ImageFeatures(nn.Module):
    """Gives a model's ``get_image_features`` the face of a module, so that it can be captured."""

    def __init__(self, root: nn.Module, function: Callable[..., Any], config: Any) -> None:
        super().__init__()
        self.root, self.function, self.config = root, function, config

    def forward(self, **inputs: Any) -> Any:
        return self.function(**inputs)


def _image_function(model: nn.Module) -> Callable[..., Any] | None:
    for owner in (model, getattr(model, "model", None), getattr(model, "base_model", None)):
        function = getattr(owner, "get_image_features", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    return None


def _vision_config(model: Any, encoder: nn.Module) -> Any:
    config = getattr(encoder, "config", None)
    return getattr(model.config, "vision_config", None) or config or model.config


def _capture_vision(
    model: Any, encoder: nn.Module
) -> tuple[Captured | None, bool, BaseException | None]:
    """(captured, whether with the model's own projector, the first error of what was tried)."""
    config = _vision_config(model, encoder)
    function = _image_function(model)
    failure: BaseException | None = None
    attempts: list[tuple[nn.Module, Callable[..., Any], bool]] = [(encoder, encoder.forward, False)]
    if function is not None:
        whole = (_ImageFeatures(model, function, model.config), function, True)
        # The exporter prepares grids for encoders; those project as well.
        last = "grid_thw" in inspect.signature(encoder.forward).parameters
        attempts.insert(len(attempts) if last else 0, whole)
    for module, signature, projected in attempts:
        module.eval()
        for inputs in vision_inputs(config, signature):
            names = tuple(n for n, v in inputs.items() if getattr(v, "is_meta", False))
            try:
                return capture(module, inputs, names), projected, failure
            except Exception as error:
                failure = failure or error
    return None, False, failure


def _lower_vision(model: Any, width: int) -> tuple[Raised | None, list[str]]:
    encoder = model.get_encoder("image") if hasattr(model, "get_encoder") else None
    if encoder is None or encoder is model or not isinstance(encoder, nn.Module):
        return None, []
    path = _path_of(model, encoder)
    captured, projected, failure = _capture_vision(model, encoder)
    because = f" ({_sentence(failure)})" if failure is not None else ""
    if captured is None:
        return None, [f"vision side left out{because}"]

    def part(module: str) -> str:
        return "vision" if (module + ".").startswith(path + ".") else "projector"

    prefix = "" if projected else path + "."
    raised = raise_operators(captured, Surroundings(prefix, part, "images"))
    features = _image_features(raised, width)
    if features is not None and not projected:
        raised = _with_projector(raised, features)
        projected = any(o.part == "projector" for o in raised.operators)
    if features is not None and features.shape[-1] != Dim(width):
        sizes = f"{features.shape[-1]} wide, the decoder {width}"
        why = f"the projector was not captured{because}"
        if projected:
            why = "the config disagrees with itself"
        return raised, [f"image features are {sizes}: {why}"]
    return raised, []


def _with_projector(raised: Raised, features: Operator) -> Raised:
    """Tell an encoder's own projector from its layers: the linears between those and the output."""
    known = {operator.name: operator for operator in raised.operators}
    pending, tail = [features.name], set()
    while pending:
        operator = known[pending.pop()]
        if operator.layer is None and operator.name not in tail:
            tail.add(operator.name)
            pending += operator.inputs
    kinds = {known[name].kind for name in tail}
    if "linear" not in kinds or "input" in kinds:
        return raised
    operators = [
        replace(operator, part="projector") if operator.name in tail else operator
        for operator in raised.operators
    ]
    return replace(raised, operators=operators)


def _lower_decoder(model: Any) -> tuple[Raised, nn.Module, int]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    embeddings = decoder.get_input_embeddings() or model.get_input_embeddings()
    width = int(embeddings.weight.shape[-1])
    marker = token_marker(decoder)
    failure: BaseException | None = None
    for inputs, activations in decoder_inputs(decoder, width, marker):
        try:
            captured = capture(decoder, inputs, activations, marker)
            break
        except Exception as error:
            failure = failure or error
    else:
        assert failure is not None
        raise NotLowered(f"its decoder cannot be captured ({_sentence(failure)})")
    marked = {
        str(node.args[2]).rpartition(".")[0]
        for node in captured.graph.nodes
        if node.op == "call_function" and opname(node) == "mark"
    }
    stacks = [s for s in captured.stacks.values() if s.path in marked]
    main = max(stacks, key=lambda s: len(s.kinds), default=None)
    path = _path_of(model, decoder)
    around = Surroundings(
        prefix=path + "." if path else "",
        part=lambda module: "decoder",
        samples="batch",
        marker=marker,
        main_stack=main.path if main else None,
    )
    layers = len(main.kinds) if main else 0
    return raise_operators(captured, around), embeddings, layers


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


def _image_features(raised: Raised, width: int) -> Operator | None:
    """The output of the vision side that the decoder takes: rows as wide as it, if any are.

    One vector for the whole image is not it while there is another output.
    """
    found = [o for o in raised.operators if o.name in raised.outputs]
    tokens = [o for o in found if _rows(o) > 1] or found
    fitting = [o for o in tokens if o.shape[-1] == Dim(width)]
    chosen = fitting or tokens
    return chosen[-1] if chosen else None


def _rows(operator: Operator) -> int:
    """Rows of an output per run of the vision side."""
    return math.prod(d.constant for d in operator.shape[1:-1])


def _image_tokens(raised: Raised, width: int) -> int:
    """Image features per run of the vision side."""
    features = _image_features(raised, width)
    return _rows(features) if features else 0


def _table(embeddings: Any) -> tuple[int, int]:
    """(entries, width) of an embedding table."""
    entries, width = embeddings.weight.shape
    return int(entries), int(width)


def lower(model: Any, name: str, dtype_bytes: int = 2) -> Lowered:
    """Lower a model that is on the meta device.

    Args:
        model: a transformers model; text-only causal models have no vision side.
        name: what the user calls it.
        dtype_bytes: bytes of one weight or activation.

    Raises:
        NotLowered: with one sentence that says why.
    """
    with _quiet(), torch.no_grad():
        decoded, embeddings, layers = _lower_decoder(model)
        width = _table(embeddings)[1]
        vision, notes = _lower_vision(model, width)
    operators: list[Operator] = []
    vision_output: tuple[str, ...] = ()
    if vision is not None:
        operators += vision.operators
        features = _image_features(vision, width) or vision.operators[-1]
        vision_output = (features.name,)
    table = Operator(
        name=_path_of(model, embeddings) or "embed_tokens",
        kind="embedding",
        shape=(Dim.of("batch"), Dim.of("query"), Dim(width)),
        module=_path_of(model, embeddings),
        attributes=(("entries", _table(embeddings)[0]), ("width", width)),
    )
    taken = {o.name for o in operators} | {o.name for o in decoded.operators}
    if table.name in taken:
        table = replace(table, name=table.name + ".table")
    operators.append(table)
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        head = None
    decoded, source = _without_head(decoded, _path_of(model, head) if head is not None else "")
    for operator in _with_windows(model, decoded.operators):
        if operator.kind == "input" and operator.name == decoded.operators[0].name:
            operator = replace(operator, inputs=(table.name, *vision_output))
        operators.append(operator)
    if head is not None:
        tied = head.weight is embeddings.weight
        operators.append(_head(model, head, source, tied))
    properties: dict[str, int | str] = {
        "model_type": str(model.config.model_type),
        "hidden_size": width,
        "decoder_layers": layers,
        "image_tokens": _image_tokens(vision, width) if vision else 0,
        "dtype_bytes": dtype_bytes,
    }
    graph, shared = without_shared(Graph(name, tuple(operators), tuple(decoded.sites), properties))
    graph = replace(graph, properties={**properties, "fingerprint": fingerprint(graph)})
    verify(graph)
    return Lowered(graph, tuple(dict.fromkeys((*notes, *decoded.reasons, *shared))))


def _without_head(decoded: Raised, path: str) -> tuple[Raised, str]:
    """The decoder without lm_head, where its own forward ends in it, and what lm_head reads."""
    for position, operator in enumerate(decoded.operators):
        if path and operator.module == path and operator.kind == "linear":
            # What follows, a scaling of the logits say, goes with it.
            return replace(decoded, operators=decoded.operators[:position]), operator.inputs[0]
    return decoded, (*decoded.outputs, decoded.operators[-1].name)[0]


def _head(model: nn.Module, head: Any, source: str, tied: bool) -> Operator:
    rows, columns = (int(s) for s in head.weight.shape)
    path = _path_of(model, head) or "lm_head"
    operator = Operator(
        name=path,
        kind="linear",
        inputs=(source,),
        # Generation needs the logits of the last token alone.
        shape=(Dim.of("batch"), Dim(1), Dim(rows)),
        module=path,
        part="head",
    ).having(**{"in": columns, "out": rows, "bias": int(getattr(head, "bias", None) is not None)})
    return operator.having(tied=1) if tied else operator


def lower_config(config: Any, name: str, model_class: Any = None) -> Lowered:
    """Lower from a transformers config alone; see `lower`."""
    with _quiet():
        model, notes = _build(config, model_class)
    dtype = getattr(config, "dtype", None) or torch.float16
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, torch.float16)
    lowered = lower(model, name, dtype_bytes=dtype.itemsize)
    return replace(lowered, notes=(*notes, *lowered.notes))


def lower_model(model: Any, name: str = "model") -> Graph:
    """Lower a stock model that has weights: a twin without weights is built and captured."""
    config = copy.deepcopy(model.config)
    with _quiet():
        try:
            config._attn_implementation = "sdpa"
            twin, _ = _build(config, type(model))
        except (NotLowered, ValueError):
            # An architecture without fused attention.
            config._attn_implementation = "eager"
            twin, _ = _build(config, type(model))
    return lower(twin, name, dtype_bytes=model.dtype.itemsize).graph


def config_fingerprint(config: Any) -> str:
    """Digest of a config's contents, for caching."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
