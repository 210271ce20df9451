"""Attention of stock blocks: computed by planner's kernel, or seen, whatever computes it.

transformers calls attention through a table of functions, chosen by name in the block's config. A
block that is to call planner's gets a view of its config with that name; in the end the function
that the config really names may be called.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planner.ir.errors import InputError
from planner.kernels.choice import Kernels, attention_is_faster
from planner.kernels.ops.attend import Attend
from planner.kernels.survivors import Survivors
from planner.models.tokens.selectors.scoring import ScoreRule

_log = logging.getLogger("planner")

RECORDING = "planner_recording"
# Functions by name: one for each choice that may end in a kernel.
KERNEL_ATTENTION = {kernels: f"planner_{kernels}" for kernels in (Kernels.TRITON, Kernels.AUTO)}
# Of other functions' masks it is not known what they mean.
_MASKS = ("sdpa", "eager")
# Arguments that change what is computed, and what they are called where they have no use.
_CHANGES = {"softcap": "caps scores", "s_aux": "has sinks", "sinks": "has sinks",
            "position_bias": "adds a bias to scores"}  # fmt: skip


def configured_attention(module: nn.Module) -> tuple[str, Callable[..., Any]]:
    """(name, function) of the attention that a block's own config names."""
    config: Any = module.config
    name: str = getattr(config, "original_config", config)._attn_implementation
    # The eager function is no part of the interface: every modelling file has its own.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return name, ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _by_kernel(
    kernels: Kernels,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Any:
    """An attention function of transformers; operands are (batch, heads, tokens, features)."""
    name, stock = configured_attention(module)
    why_not = _obstacle(name, query, value, attention_mask, options)
    if why_not is not None:
        _tell_once(f"attention of {type(module).__name__} runs without planner's kernel: {why_not}")
        return stock(module, query, key, value, attention_mask, **options)
    if kernels is Kernels.AUTO and not attention_is_faster(
        query.device, query.shape, key.shape, query.itemsize
    ):
        return stock(module, query, key, value, attention_mask, **options)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # What has no mask is causal for sdpa alone; eager functions are always given one.
    causal = bool(causal) and name == "sdpa" and attention_mask is None and query.shape[2] > 1
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    every = Survivors.everything(key.shape[1], query.device)
    mixed = Attend(query, key, value, attention_mask, every, scale, causal)
    return mixed.run(triton=True), None


def _obstacle(
    name: str, query: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> str | None:
    """Why the kernel does not compute an attention."""
    if name not in _MASKS:
        return f"masks of '{name}' are not read"
    for argument, what in _CHANGES.items():
        if options.get(argument) is not None:
            return f"it {what}"
    if options.get("dropout"):
        return "it drops weights"
    if options.get("output_attentions"):
        return "its weights are asked for"
    if value.shape[-1] != query.shape[-1]:
        return "its values are not as wide as its keys"
    if mask is not None and mask.ndim != 4:
        return f"its mask has {mask.ndim} dimensions"
    return None


@cache
def _tell_once(message: str) -> None:
    _log.warning("%s", message)


for _kernels, _name in KERNEL_ATTENTION.items():
    ALL_ATTENTION_FUNCTIONS.register(_name, partial(_by_kernel, _kernels))


@dataclass(frozen=True, eq=False)
class Recorded:
    """What one run of an attention block computed with."""

    query: Tensor  # (rows, heads, tokens, head_dim), rotated
    key: Tensor  # (rows, kv heads, keys, head_dim), rotated
    mask: Tensor | None  # as the block got it
    rule: ScoreRule  # how it made scores
    rows: Tensor | None = None  # of the batch; None for all
    valid: Tensor | None = None  # (rows, keys), bool: False for padding; None where there is none
    # (rows, tokens), int64: of its tokens in the pass; None where they are all that it has.
    places: Tensor | None = None


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Any:
    """An attention function that has its config's view `record` what it gets, and calls another.

    That is the view's `attention`, by default the one that the config names.
    """
    if options.get("position_bias") is not None:
        raise InputError(
            f"tokens cannot be scored by {type(module).__name__}: it adds a bias to its scores"
        )
    sinks = options.get("sinks") if options.get("s_aux") is None else options["s_aux"]
    rule = ScoreRule(options.get("scaling"), options.get("softcap"), sinks)
    view: Any = module.config
    view.record(Recorded(query, key, attention_mask, rule))
    attend = configured_attention(module)[1]
    if view.attention is not None:
        attend = ALL_ATTENTION_FUNCTIONS[view.attention]
    return attend(module, query, key, value, attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(RECORDING, _record)
