"""What a stock config can say of a plan: sizes that are the same in every layer.

Some architectures refuse a number of attention heads that does not divide the hidden size (Llama),
others take any (Qwen3). The config class itself is asked, so no architecture is named here.
"""

from __future__ import annotations

import copy
from typing import Any


def keep_heads(text: Any, left: int, of: int) -> None:
    """Let a text config say that `left` of `of` KV groups are kept in every layer.

    Raises AttributeError where the config says its heads otherwise.
    """
    heads = text.num_attention_heads
    # Otherwise a smaller number of heads would mean wider ones.
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    text.num_attention_heads = heads * left // of
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = left


def reread(config: Any) -> Any:
    """The config as it would be loaded from a file, with the checks of its class."""
    return type(config).from_dict(config.to_dict())


def head_counts(config: Any, groups: int) -> tuple[int, ...]:
    """Numbers of KV groups, equal in all layers, that a stock config takes instead of `groups`."""
    counts = []
    for left in range(1, groups + 1):
        smaller = copy.deepcopy(config)
        try:
            keep_heads(smaller.get_text_config(decoder=True), left, groups)
            reread(smaller)
        # Config classes check themselves with exceptions of many types.
        except Exception:
            continue
        counts.append(left)
    return tuple(counts)
