"""Prompts of compiled models: read off the inputs of captured graphs.

A graph that is given tokens and no filled cache begins a prompt, and under a budget its plan;
graphs that follow run that plan, until the next prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from planner.backend.blocks import value_of
from planner.ir.cost import Workload
from planner.ir.cost.price import operator_flops
from planner.ir.graph import Graph
from planner.ir.lowering.aten import opname, upstream
from planner.models.running.prompts import is_visual
from planner.models.running.session import Session, Setting

_NAME = re.compile(r"\['(input_ids|inputs_embeds|pixel_values\w*)'\]$|\.(keys|cumulative_length)$")
_POSITIONAL = re.compile(r"\['args'\]\[\d+\]$")
# Key of a session -> samples and tokens of the prompt that was begun by ids last.
_begun: ContextVar[tuple[int, tuple[int, int]] | None] = ContextVar("planner_begun", default=None)


@dataclass(frozen=True)
class Places:
    """Where among a graph's inputs a prompt is; None where it is not."""

    ids: int | None  # token ids, shape (batch, tokens)
    embeddings: int | None  # in place of ids, shape (batch, tokens, width)
    pixels: int | None
    length: int | None  # tokens in a static cache
    keys: int | None  # in a dynamic cache, shape (batch, heads, tokens, width)

    def begins(self, inputs: Sequence[Any]) -> bool:
        """Whether no cache is given that has tokens."""
        if self.length is not None:
            return not int(inputs[self.length])
        return self.keys is None or not inputs[self.keys].shape[-2]


def places_of(graph_module: fx.GraphModule, model: nn.Module) -> Places | None:
    """Where the inputs of a captured graph have a prompt; None where it is given no tokens.

    Ids are found by their name, else as what the model's own table of embeddings is read at:
    arguments that are given by position have no name.
    """
    found: dict[str, int] = {}
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for place, node in enumerate(nodes):
        source = getattr(node, "_dynamo_source", None)
        match = _NAME.search(source.name) if source is not None else None
        if match is not None:
            found.setdefault((match[1] or match[2]).partition("_values")[0], place)
    embed = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    ids = found.get("input_ids", _looked_up(graph_module, nodes))
    embeddings = found.get("inputs_embeds")
    if ids is None and embeddings is None and isinstance(embed, Tensor):
        embeddings = next((n for n, x in enumerate(nodes) if _embeds(x, embed.shape[-1])), None)
    if ids is None and embeddings is None:
        return None
    others = (found.get(name) for name in ("pixel", "cumulative_length", "keys"))
    return Places(ids, embeddings, *others)


def _looked_up(graph_module: fx.GraphModule, entering: Sequence[fx.Node]) -> int | None:
    """The input, of whole numbers, that the first embedding of a graph is read at."""
    for node in graph_module.graph.nodes:
        if opname(node) == "embedding":
            first = node.args[0] if node.args else None
            met = upstream(first, lambda _: True) if isinstance(first, fx.Node) else {}
            for place, source in enumerate(entering):
                if source in met and _is_tensor(source, 2, floating=False):
                    return place
            return None
    return None


def _embeds(node: fx.Node, width: int) -> bool:
    """Whether an input is an argument without a name that can only be embeddings."""
    source = getattr(node, "_dynamo_source", None)
    given = source is not None and _POSITIONAL.search(source.name) is not None
    return given and _is_tensor(node, 3, floating=True) and value_of(node).shape[-1] == width


def _is_tensor(node: fx.Node, dimensions: int, *, floating: bool) -> bool:
    value = value_of(node)
    fits = isinstance(value, Tensor) and value.ndim == dimensions
    return fits and value.is_floating_point() == floating and value.dtype != torch.bool


def begin(session: Session, places: Places, inputs: Sequence[Any]) -> None:
    """Plan for a prompt, where these inputs are one and a budget holds in this context."""
    setting, planning = session.setting, session.planning
    if setting is None or setting.asked is None or planning is None or not places.begins(inputs):
        return
    by_ids = places.ids is not None
    tokens = inputs[places.ids if by_ids else places.embeddings]  # type: ignore[index]
    size = (int(tokens.shape[0]), int(tokens.shape[1]))
    if not by_ids and _begun.get() == (session.key, size):
        # What was embedded before a graph break.
        return
    if by_ids:
        _begun.set((session.key, size))
    pixels = None if places.pixels is None else inputs[places.pixels]
    prompt = prompt_of(session, tokens, pixels, planning.request.new_tokens)
    session.note(session.plans_on(prompt))


def prompt_of(session: Session, tokens: Tensor, pixels: Tensor | None, new: int) -> Workload:
    """A prompt whose logits are all computed, and whose encoders cost no more than is said.

    `tokens`: ids, shape (batch, tokens), or embeddings, of which none is known to be an image's.
    `pixels`: None where features were computed before.
    """
    batch, length = tokens.shape[:2]
    by_row = is_visual(tokens, session.model).sum(1) if tokens.ndim == 2 else torch.zeros(1)
    every, least = int(by_row.sum()), int(by_row.min())
    per_run = int(session.graph.properties.get("image_tokens", 0))
    runs, size = math.ceil(every / per_run) if per_run else 0, 1
    if pixels is not None and pixels.ndim > 3:
        runs = math.prod(pixels.shape[:-3])
    elif runs:
        # Patches of pictures of any size: as one large picture they would cost most.
        runs, size = 1, runs
    encoder = runs * _encoder_flops(session.graph, size)
    return Workload(least, length - least, new, batch, per_run, length, encoder)


def _encoder_flops(graph: Graph, size: int) -> int:
    """FLOPs of one run of the encoder, on a picture of so many times the patches it has there."""
    one = dict.fromkeys(("batch", "images", "query", "context", "encoding", "encoded"), 1)
    encoder = [operator for operator in graph if operator.part in ("vision", "projector")]
    # What patches do with each other grows by the square.
    pairs = sum(operator_flops(o, one) for o in encoder if o.kind in ("attention", "matmul"))
    return size * sum(operator_flops(o, one) for o in encoder) + (size**2 - size) * pairs


def program_of(session: Session) -> Any:
    """What this context runs now; None is the base model."""
    plans = session.plans
    return session.program_of(Setting(plans)) if plans else session.program
