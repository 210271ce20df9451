"""Prompts of compiled models: read off the inputs of captured graphs.

A graph that is given token ids and no filled cache begins a prompt, and under a budget its plan;
graphs that follow run that plan, until the next prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from planner.ir.cost import Workload
from planner.ir.cost.price import operator_flops
from planner.ir.graph import Graph
from planner.models.running.prompts import is_visual
from planner.models.running.session import Session, Setting

_NAME = re.compile(r"\['(input_ids|pixel_values\w*)'\]$|\.(keys|cumulative_length)$")


@dataclass(frozen=True)
class Places:
    """Where among a graph's inputs a prompt is; None where it is not."""

    ids: int  # token ids, shape (batch, tokens)
    pixels: int | None
    length: int | None  # tokens in a static cache
    is_filled: bool  # whether the graph goes on with a dynamic cache that has tokens


def places_of(graph_module: fx.GraphModule) -> Places | None:
    """Where the inputs of a captured graph have a prompt; None where it is given no token ids."""
    found: dict[str, int] = {}
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for place, node in enumerate(nodes):
        source = getattr(node, "_dynamo_source", None)
        match = _NAME.search(source.name) if source is not None else None
        if match is not None:
            found.setdefault((match[1] or match[2]).partition("_values")[0], place)
    if "input_ids" not in found:
        return None
    length = found.get("cumulative_length")
    return Places(
        found["input_ids"], found.get("pixel"), length, "keys" in found and length is None
    )


def begin(session: Session, places: Places, inputs: Sequence[Any]) -> None:
    """Plan for a prompt, where these inputs are one and a budget holds in this context."""
    setting, planning = session.setting, session.planning
    ids = inputs[places.ids]
    if setting is None or setting.asked is None or planning is None:
        return
    if places.is_filled or (places.length is not None and int(inputs[places.length])):
        return
    pixels = None if places.pixels is None else inputs[places.pixels]
    prompt = prompt_of(session, ids, pixels, planning.request.new_tokens)
    session.note(session.plans_on(prompt))


def prompt_of(session: Session, ids: Tensor, pixels: Tensor | None, new: int) -> Workload:
    """A prompt whose logits are all computed, and whose encoders cost no more than is said.

    `ids`: shape (batch, tokens). `pixels`: None where features were computed before.
    """
    batch, tokens = ids.shape
    by_row = is_visual(ids, session.model).sum(1)
    every, least = int(by_row.sum()), int(by_row.min())
    per_run = int(session.graph.properties.get("image_tokens", 0))
    runs, size = math.ceil(every / per_run) if per_run else 0, 1
    if pixels is not None and pixels.ndim > 3:
        runs = math.prod(pixels.shape[:-3])
    elif runs:
        # Patches of pictures of any size: as one large picture they would cost most.
        runs, size = 1, runs
    encoder = runs * _encoder_flops(session.graph, size)
    return Workload(least, tokens - least, new, batch, per_run, tokens, encoder)


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
