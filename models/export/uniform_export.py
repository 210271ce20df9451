"""Plain exports: a stock config that says the smaller sizes, and weights that fit it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from planner.ir.intervals import count_of
from planner.models.export.weights import cast, kept_weights
from planner.models.running.bindings import BoundSite
from planner.models.running.program import LayerProgram, Program
from planner.planning.config_sizes import keep_heads, reread


class NotPlain(Exception):
    """A plan that no stock config describes; the message is one sentence and says why."""


def save_plain(
    model: Any, program: Program, folder: Path, stored_dtype: torch.dtype | None, **facts: str
) -> Any:
    """Write config and weights, for arguments as of `save_planned`.

    Returns the model, read back by the stock loader. Raises NotPlain: there is no such config.
    """
    kept = [layer for layer in program.layers if layer.groups[0].on]
    config = _smaller_config(model, program, kept)
    for name, value in facts.items():
        setattr(config, name, value)
    with torch.device("meta"), no_init_weights():
        smaller = type(model)(config)
    weights = _renumbered(kept_weights(model, program), kept)
    wanted = smaller.state_dict()
    for name in [*wanted, *weights]:
        want, have = (_shape(state, name) for state in (wanted, weights))
        if want != have:
            raise NotPlain(
                f"{type(model).__name__} does not take these sizes from its config: {name} would "
                f"be {want}, and the plan's is {have}"
            )
    smaller.load_state_dict(weights, assign=True)
    smaller.tie_weights()
    smaller.generation_config = copy.deepcopy(model.generation_config)
    smaller.save_pretrained(folder, state_dict=cast(smaller.state_dict(), stored_dtype))
    loaded = type(model).from_pretrained(
        folder, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    return loaded.eval()


def _shape(state: dict[str, Tensor], name: str) -> str:
    return "x".join(map(str, state[name].shape)) if name in state else "absent"


def _smaller_config(model: Any, program: Program, kept: Sequence[LayerProgram]) -> Any:
    """The base model's config with the sizes of the plan."""
    if not kept:
        raise NotPlain("the plan leaves no layer on")
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    groups = _same("KV groups", [_width(x.layer.heads, x.groups[0].heads) for x in kept])
    neurons = _same("MLP neurons", [_width(x.layer.mlp, x.groups[0].mlp) for x in kept])
    try:
        if groups is not None:
            keep_heads(text, *groups)
        if neurons is not None:
            text.intermediate_size = neurons[0]
        text.num_hidden_layers = len(kept)
    except AttributeError as error:
        raise NotPlain(
            f"the config of {type(model).__name__} says its sizes otherwise: {error}"
        ) from None
    chosen = [layer.layer.index for layer in kept]
    for name, value in vars(text).items():
        # What a config says layer by layer, such as layer_types.
        if "layer" in name and isinstance(value, list) and len(value) == len(program.layers):
            setattr(text, name, [value[index] for index in chosen])
    try:
        return reread(config)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise NotPlain(
            f"transformers refuses such a {type(text).__name__}: "
            f"{(lines or [type(error).__name__])[-1].removeprefix('ValueError: ').rstrip('.')}"
        ) from None


def _width(site: BoundSite | None, lanes: Any) -> tuple[int, int] | None:
    """(lanes kept, lanes) of a site; None where there is none to narrow."""
    if site is None:
        return None
    of = site.site.lanes
    return (of if lanes is None else count_of(lanes)), of


def _same(what: str, widths: list[tuple[int, int] | None]) -> tuple[int, int] | None:
    """The width that all layers have; None where all of them are as in the base model."""
    narrowed = [width for width in widths if width is None or width[0] != width[1]]
    if not narrowed:
        return None
    found = {width and width[0] for width in widths}
    if len(found) > 1:
        counts = sorted(count for count in found if count is not None)
        raise NotPlain(
            f"layers keep different numbers of {what} ({counts[0]} to {counts[-1]}), and a stock "
            "config has one for all (compile with --uniform for such a plan)"
        )
    width = narrowed[0]
    if width is None:
        return None
    if not width[0]:
        raise NotPlain(f"the plan keeps no {what}, and a stock config needs at least one")
    return width


def _renumbered(weights: dict[str, Tensor], kept: Sequence[LayerProgram]) -> dict[str, Tensor]:
    """Names with the numbers that layers have among those kept."""
    renamed = {}
    for name, value in weights.items():
        for number, layer in enumerate(kept):
            prefix = f"{layer.layer.path}."
            if name.startswith(prefix):
                parent = layer.layer.path.rpartition(".")[0]
                name = f"{parent}.{number}.{name.removeprefix(prefix)}"
                break
        renamed[name] = value
    return renamed
