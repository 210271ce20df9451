"""Whole models: built without weights, their parts lowered and joined into one Graph.

Everything is found by transformers' accessors and by structure; no architecture is named.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import nn

from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Operator
from planner.ir.graph_text import fingerprint
from planner.ir.lowering.attempts import NotLowered, first_success, quiet, sentence
from planner.ir.lowering.capture import build_on_meta, path_of
from planner.ir.lowering.decoder import decoder_of, lower_decoder
from planner.ir.lowering.vision_side import lower_vision
from planner.ir.structure import (
    exit_of,
    residual_entry,
    unnarrowed_readers,
    within,
    without_sites,
)
from planner.ir.verify import verify


@dataclass(frozen=True)
class Lowered:
    """A Graph, and what was left out of it and why (one sentence each)."""

    graph: Graph
    notes: tuple[str, ...] = ()


def _build(config: Any) -> tuple[nn.Module, list[str]]:
    """The model on the meta device; its text model alone where the whole cannot be built."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    sees = type(config) in AutoModelForImageTextToText._model_mapping
    candidates = [(config, AutoModelForImageTextToText if sees else AutoModelForCausalLM)]
    try:
        text = config.get_text_config(decoder=True)
    except Exception:
        text = config
    if text is not config:
        candidates += [(text, AutoModelForCausalLM), (text, AutoModel)]
    attempts = (partial(build_on_meta, copy.deepcopy(c), a.from_config) for c, a in candidates)
    model, failure = first_success(attempts)
    if model is None:
        raise NotLowered(
            f"'{config.model_type}' cannot be built from its config ({sentence(failure)})"
        )
    why = f"text model only; the whole could not be built ({sentence(failure)})"
    return model, [why] if failure else []


def lower(model: Any, name: str, dtype_bytes: int = 2) -> Lowered:
    """Lower a transformers model on the meta device, which the user calls `name`; NotLowered says
    why not."""
    embeddings = decoder_of(model).get_input_embeddings() or model.get_input_embeddings()
    entries, width = (int(size) for size in embeddings.weight.shape)
    with quiet(), torch.no_grad():
        decoded, layers = lower_decoder(model, embeddings)
        vision = lower_vision(model, width)
    path = path_of(model, embeddings)
    table = Operator(
        name=path or "embed_tokens",
        kind="embedding",
        shape=(Dim.of("batch"), Dim.of("query"), Dim(width)),
        module=path,
        attributes=(("entries", entries), ("width", width)),
    )
    if any(operator.name == table.name for operator in (*vision.operators, *decoded.operators)):
        table = replace(table, name=table.name + ".table")
    # Image features join the words, or layers attend to them beside.
    sees = (vision.output,) if vision.output else ()
    entering = [operator for operator in decoded.operators if operator.kind == "input"]
    encoded = {o.name for o in entering if any("encoding" in dim.symbols for dim in o.shape)}
    words = (table.name,) if encoded else (table.name, *sees)
    fed = {o.name: sees if o.name in encoded else words for o in entering}
    decoder = [replace(o, inputs=fed.get(o.name, o.inputs)) for o in decoded.operators]
    properties: dict[str, int | str] = {
        "model_type": str(model.config.model_type),
        "hidden_size": width,
        "decoder_layers": layers,
        "image_tokens": 0 if encoded else vision.tokens,
        "dtype_bytes": dtype_bytes,
    }
    if encoded:
        properties["encoded_tokens"] = vision.tokens
    operators = (*vision.operators, table, *decoder)
    graph, shared = without_shared(Graph(name, operators, tuple(decoded.sites), properties))
    graph = replace(graph, properties={**properties, "fingerprint": fingerprint(graph)})
    verify(graph)
    return Lowered(graph, tuple(dict.fromkeys((*vision.notes, *decoded.reasons, *shared))))


def without_shared(graph: Graph) -> tuple[Graph, list[str]]:
    """The graph without sites that operators outside need whole, and a sentence for each kind.

    Some models let later layers attend to an earlier layer's keys and values. The heads of that
    layer belong to all of its readers, and it cannot be left out.
    """
    reasons = {
        site: f"{site}: {reader} reads {source}, which it does not narrow"
        for reader, source, site in unnarrowed_readers(graph)
    } | _not_left_out(graph)
    if not reasons:
        return graph, []
    return without_sites(graph, reasons), _summary(reasons)


def _summary(reasons: dict[str, str]) -> list[str]:
    """The first reason of each kind of site, and how many sites there are besides."""
    kinds: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        kinds.setdefault(name.partition(".")[0], []).append(reason)
    return [
        first + (f" (and {len(others)} layers more)" if others else "")
        for first, *others in kinds.values()
    ]


def _not_left_out(graph: Graph) -> dict[str, str]:
    """Layers that cannot be left out -> why."""
    reasons = {}
    for site in graph.sites_of("layer"):
        inside = within(graph, site)
        try:
            residual_entry(graph, site, inside, exit_of(graph, site, inside))
        except InputError as error:
            reasons[site.name] = str(error)
    return reasons


def lower_config(config: Any, name: str) -> Lowered:
    """Lower from a transformers config alone; see `lower`."""
    with quiet():
        model, notes = _build(config)
    dtype = getattr(config, "dtype", None) or torch.float16
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, torch.float16)
    lowered = lower(model, name, dtype_bytes=dtype.itemsize)
    return replace(lowered, notes=(*notes, *lowered.notes))


def lower_model(model: Any, name: str = "model") -> Graph:
    """Lower a stock model that has weights: a twin without weights is built and captured.

    The Graph depends on the model's class, config and precision alone, and models that are alike in
    those are lowered once in a process.
    """
    stock = _Stock(type(model), _facts(model.config), model.dtype.itemsize, model.config)
    return replace(_lowered(stock), name=name)


@dataclass(frozen=True)
class _Stock:
    """What the Graph of a stock model depends on."""

    kind: type
    facts: str  # all that its config says
    dtype_bytes: int
    config: Any = field(compare=False)


def _facts(config: Any) -> str:
    known = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    experts = getattr(config.get_text_config(), "_experts_implementation", None)
    return repr([known, experts])


@lru_cache(maxsize=64)
def _lowered(stock: _Stock) -> Graph:
    config = copy.deepcopy(stock.config)
    build = cast(Any, stock.kind)._from_config
    with quiet():
        try:
            config._attn_implementation = "sdpa"
            twin = build_on_meta(copy.deepcopy(config), build)
        except ValueError:
            # An architecture without fused attention.
            config._attn_implementation = "eager"
            twin = build_on_meta(copy.deepcopy(config), build)
    return lower(twin, "model", stock.dtype_bytes).graph
