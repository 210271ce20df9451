"""How long a launch will take, by the model that also chose its tile. Nothing is timed.

Matrix products are predicted by `planner.kernels.tiles`; everything else is a roofline: its
operations at the target's peak or its bytes at the target's bandwidth, whichever takes longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from planner.kernels.launch import Launch
from planner.kernels.tiles import Product, Target, Tile, matmul_seconds

__all__ = ["predicted_seconds"]


def predicted_seconds(launch: Launch, target: Target) -> float:
    """Seconds of a recorded launch on a target."""
    name, given = launch.kernel.fn.__name__, launch.arguments
    if name.startswith("project_"):
        return _product_seconds(name, launch, target)
    seconds = _bytes(given) / (target.bandwidth_gb_per_s * 1e9)
    if name == "attend_kernel":
        return max(seconds, _attention_flops(given) / (target.tflops * 1e12))
    return seconds


def _product_seconds(name: str, launch: Launch, target: Target) -> float:
    given = launch.arguments
    parts, stages = 1, launch.stages
    if name == "project_qkv_kernel":
        columns = given["slots"] * (given["GROUP"] + 2) * given["HEAD_DIM"]
        depth, like = given["depth"], given["x"]
    elif name == "project_up_kernel":
        columns = given["slots"] * given["WIDTH"]
        depth, like = given["depth"], given["x"]
        parts = 1 if given["gate_weight"] is None else 2
    else:
        columns, depth = given["features_out"], given["slots"] * given["WIDTH"]
        like, stages = given["a"], (stages + 1) // 2  # see `output.pipeline`
    block_m, block_n, block_k = (given[f"BLOCK_{axis}"] for axis in "MNK")
    tile = Tile(block_m, block_n, block_k, launch.warps, stages, given["GROUP_ROWS"])
    wanted = Product(
        given["rows"], columns, depth, target, launch.grid[1], like.element_size(), parts
    )
    return matmul_seconds(tile, wanted)


def _bytes(given: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in given.values() if isinstance(value, Tensor))


def _attention_flops(given: Mapping[str, Any]) -> int:
    """Of a prompt that sees itself: causal attention does half of all pairs."""
    batch, tokens, heads, head_dim = given["queries"].shape
    pairs = tokens * (tokens + 1) // 2 if given["CAUSAL"] else tokens * tokens
    return 4 * int(batch * heads * head_dim * pairs)
