"""Seeing what an attention block computes with, whatever computes it.

transformers calls attention through a table of functions, chosen by name in the block's config. A
block that is to be seen gets a view of its config with the name of a function that notes queries
and keys and then calls the one that the config really names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planner.models.running.patches import ConfigView

RECORDING = "planner_recording"


@dataclass(frozen=True, eq=False)
class Recorded:
    """What one run of an attention block computed with.

    Attributes:
        query: shape (rows, heads, tokens, head_dim), rotated.
        key: shape (rows, kv heads, keys, head_dim), rotated.
        mask: as the block got it.
        scaling: factor on the scores; None is 1/sqrt(head_dim).
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float | None


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    """An attention function that notes queries and keys, then calls the one configured."""
    view: Any = module.config
    view.record(Recorded(query, key, mask, kwargs.get("scaling")))
    # The eager function is no part of the interface: every modelling file has its own.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    configured = view.attention or view.original_config._attn_implementation
    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(configured, eager)
    return attend(module, query, key, value, mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(RECORDING, _record)


def recording(
    config: Any, record: Callable[[Recorded], None], attention: str | None = None, **replaced: Any
) -> ConfigView:
    """A config under which an attention block hands what it computes with to `record`.

    Args:
        config: the block's.
        record: gets what was seen.
        attention: the function that is called then; None for the one that the config names.
        replaced: attributes to replace besides.
    """
    view = {"_attn_implementation": RECORDING, "record": record, "attention": attention}
    return ConfigView(config, **view, **replaced)
