"""The Python function ``run`` of a generated file: it allocates, and launches kernel by kernel.

Enters: the kernels of a block with the parameters that they still have. Leaves: text. A parameter
is bound by its name, or by the name that it has in this block (`_NAMES`); what no launch makes is
an argument of ``run``, in the order of `_arguments`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import triton

from planner.kernels.launch import Launch
from planner.kernels.shapes import AttentionShape, MLPShape, Shape, TokenShape
from planner.kernels.text import WIDTH, wrapped

__all__ = ["Step", "run_function"]

_STRIDES = {
    "angle_sample_stride": "cos.stride(0) if len(cos) > 1 else 0",
    "angle_token_stride": "cos.stride(1)",
    "position_stride": "key_positions.stride(0)",
    "plan_stride": "int(plans > 1)",
}
_NORMALIZE = {
    "x": "hidden",
    "weight": "norm_weight",
    "bias": "norm_bias",
    "out": "normed",
    "eps": "norm_eps",
    "offset": "norm_offset",
}
# Shape -> kernel -> parameter -> what it is called in ``run``.
_NAMES: Mapping[type[Shape], Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        AttentionShape: {
            "normalize_kernel": _NORMALIZE,
            "attend_kernel": {"out": "mixed"},
            "attend_split_kernel": {"out": "partial", "weight": "log_sums"},
            "join_splits_kernel": {"out": "mixed", "weight": "log_sums"},
            "project_out_kernel": {"a": "mixed", "weight": "output_weight", "bias": "output_bias"},
        },
        MLPShape: {
            "normalize_kernel": _NORMALIZE,
            "project_up_kernel": {"out": "inner"},
            "project_out_kernel": {"a": "inner", "weight": "down_weight", "bias": "down_bias"},
        },
        TokenShape: {
            "choose_kernel": {"candidates": "candidates.to(torch.int8)"},
            "gather_kernel": {"x": "hidden", "out": "chosen"},
        },
    }
)
_RESULTS: Mapping[type[Shape], str] = MappingProxyType(
    {AttentionShape: "out", MLPShape: "out", TokenShape: "chosen, index"}
)


_DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "norm_eps": "1e-6",
        "norm_offset": "0.0",
        "head_norm_eps": "1e-6",
        "head_norm_offset": "0.0",
    }
)


@dataclass(frozen=True)
class Step:
    """One launch of ``run``.

    Attributes:
        kernel: its name in the file.
        parameters: that the kernel still has, in order.
        launch: as recorded.
        stages: of the pipeline.
    """

    kernel: str
    parameters: tuple[str, ...]
    launch: Launch
    stages: int


def run_function(
    shape: Shape, summary: str, steps: Sequence[Step], tables: Sequence[str], index_driven: bool
) -> str:
    """Source of ``run``.

    Args:
        shape: of the block.
        summary: first line of its docstring.
        steps: in order.
        tables: parameters that are index tensors with constant contents; the file has ``TABLES``.
        index_driven: whether survivors are arguments.
    """
    host = _Host(shape, index_driven)
    body = [line for step in steps for line in host.step(step)]
    arguments = _arguments(shape, steps)
    used = [name for name in arguments if name in host.read]
    free = [name for name in used if name not in tables]
    positional = [name for name in free if name in ("hidden", "residual")]
    keywords = [name for name in free if name not in positional]
    doc = wrapped(f'"""{summary}'.split(" "), " ", "    ")
    lines = ["def run(", *(f"    {n},  # {arguments[n]}" for n in positional), "    *,"]
    defaults = dict(_DEFAULTS)
    if not isinstance(shape, MLPShape):
        defaults["scale"] = repr(shape.head_dim**-0.5)
    for name in keywords:
        default = f"={defaults[name]}" if name in defaults else ""
        lines.append(f"    {name}{default},  # {arguments[name]}")
    derived = {
        "rows": "batch * tokens",
        "plans": "len(counts)",
        "rows_per_plan": "rows // plans",
    }
    lines += [
        "):",
        f'{doc}"""' if len(doc) < WIDTH - 3 else f'{doc}\n    """',
        "    batch, tokens, _ = hidden.shape",
        *(f"    {name} = {value}" for name, value in derived.items() if name in host.read),
        *(f"    {name} = {name}.contiguous()" for name in positional),
        *(f'    {name} = table("{name}", hidden.device)' for name in used if name in tables),
        *body,
        f"    return {_RESULTS[type(shape)]}",
    ]
    return "\n".join(lines) + "\n"


class _Host:
    """Writes launches; `read` are the names that they take from outside, `made` their buffers."""

    def __init__(self, shape: Shape, index_driven: bool) -> None:
        self.shape, self.index_driven = shape, index_driven
        self.read: set[str] = {"hidden"}
        self.made: set[str] = set()

    def step(self, step: Step) -> list[str]:
        kernel = step.launch.kernel.fn.__name__
        names = {**_STRIDES, **_NAMES[type(self.shape)].get(kernel, {})}
        values = [names.get(parameter, parameter) for parameter in step.parameters]
        if kernel == "attend_split_kernel" and "weight" not in step.parameters:
            values = ["mixed" if value == "partial" else value for value in values]
        if kernel.startswith("project_"):
            # A norm that has run on its own has given them another input.
            first = "normed" if "normed" in self.made else "hidden"
            values = [first if value == "x" else value for value in values]
            if self.index_driven:
                values = ["rows_per_plan" if value == "rows" else value for value in values]
                self.read |= {"rows", "plans", "counts"}
        lines = []
        buffers = _buffers(self.shape, step.launch)
        for value in values:
            if value in buffers and value not in self.made:
                self.made.add(value)
                lines.append(f"    {value} = {buffers[value]}")
        for value in values:
            self.read |= set(re.findall(r"[a-z_]+", value)) - self.made
        grid = _grid(step.launch, self.index_driven)
        options = [f"num_warps={step.launch.warps}", f"num_stages={step.stages}"]
        call = f"    {step.kernel}[{grid}]({', '.join([*values, *options])})"
        if len(call) > WIDTH:
            inside = wrapped([*values, *options, ""], ", ", " " * 8)
            call = f"    {step.kernel}[{grid}](\n{inside}\n    )"
        return [*lines, call]


def _grid(launch: Launch, index_driven: bool) -> str:
    """The launch's grid as an expression in rows, tokens and batch."""
    kernel, grid, given = launch.kernel.fn.__name__, launch.grid, launch.arguments
    if kernel == "normalize_kernel":
        return f"(triton.cdiv(rows, {given['BLOCK_M']}),)"
    if kernel.startswith("project_"):
        columns = grid[0] // triton.cdiv(given["rows"], given["BLOCK_M"])
        rows, plans = ("rows_per_plan", "plans") if index_driven else ("rows", "1")
        return f"(triton.cdiv({rows}, {given['BLOCK_M']}) * {columns}, {plans})"
    if kernel == "attend_kernel":
        return f"(triton.cdiv(tokens, {given['BLOCK_M']}), {grid[1]}, batch)"
    if kernel == "gather_kernel":
        return f"(batch * length, {grid[1]})"
    first = "".join(f"{programs}, " for programs in grid[:-1])
    return f"({first}batch)" if first else "(batch,)"


def _buffers(shape: Shape, launch: Launch) -> dict[str, str]:
    """How ``run`` allocates what a launch writes."""
    given = launch.arguments
    made = {
        "normed": "torch.empty_like(hidden)",
        "mixed": "torch.empty_like(queries)",
        "out": "torch.empty_like(hidden)",
        "index": "hidden.new_empty(batch, length, dtype=torch.int32)",
        "chosen": "hidden.new_empty(batch, length, hidden.shape[2])",
    }
    slots = given.get("slots")
    if isinstance(shape, MLPShape):
        made["inner"] = f"hidden.new_empty(batch, tokens, {slots} * {given.get('WIDTH')})"
        return made
    heads = f"{slots} * {shape.group}" if shape.group > 1 else str(slots)
    if isinstance(shape, TokenShape):
        made["scores"] = f"hidden.new_empty(batch, {slots}, tokens, dtype=torch.float32)"
        return made
    parts = f"batch, {heads}, {given.get('splits')}"
    return made | {
        "queries": f"hidden.new_empty(batch, tokens, {heads}, {shape.head_dim})",
        "partial": f"hidden.new_empty({parts}, {shape.head_dim}, dtype=torch.float32)",
        "log_sums": f"hidden.new_empty({parts}, dtype=torch.float32)",
    }


def _arguments(shape: Shape, steps: Sequence[Step]) -> dict[str, str]:
    """What ``run`` may take, and its shape."""
    hidden = shape.hidden
    slots = next(s.launch.arguments["slots"] for s in steps if "slots" in s.launch.arguments)
    taken = {
        "hidden": f"[batch, tokens, {hidden}]",
        "residual": f"[batch, tokens, {hidden}], added to the result",
        "norm_weight": f"[{hidden}]",
        "norm_bias": f"[{hidden}]",
    }
    if isinstance(shape, MLPShape):
        rows = f"[{shape.neurons}, {hidden}]"
        taken |= {
            "gate_weight": rows,
            "up_weight": rows,
            "down_weight": f"[{hidden}, {shape.neurons}]",
            "gate_bias": f"[{shape.neurons}]",
            "up_bias": f"[{shape.neurons}]",
            "down_bias": f"[{hidden}]",
        }
    if isinstance(shape, AttentionShape):
        taken |= _attention_arguments(shape)
    if isinstance(shape, TokenShape):
        heads = f"{slots * shape.group}, {shape.head_dim}"
        taken |= {
            "queries": f"[batch, {heads}]: the last token's, rotated",
            "candidates": "[batch, tokens] bool: tokens that compete",
            "keep": "[batch] int32: how many of these stay",
            "length": "tokens per sample of the result",
        }
    head_dim = 0 if isinstance(shape, MLPShape) else shape.head_dim
    return taken | {
        "units": f"[plans, {slots}] int32: surviving units of one plan, or of one per sample",
        "counts": "[plans] int32: how many of a row are meant",
        "lanes": f"[plans, {slots}] int32: bit j set if lane j of the unit survives",
        "positions": "[batch, tokens] int32: places in the whole prompt, negative for padding",
        "keys": f"[cache rows, {head_dim}]",
        "values": f"[cache rows, {head_dim}]",
        "first": "[batch] int32: row of a sample's first token",
        "room": "[batch] int32: rows from one KV group to the next",
        "lengths": "[batch] int32: tokens in the cache before this call",
        "key_positions": "[batch, >= keys] int32: of all in the cache after this call",
        "norm_eps": "under the root",
        "norm_offset": "added to the weight",
        "head_norm_eps": "under the root",
        "head_norm_offset": "added to the weights",
        "scale": "on scores",
    }


def _attention_arguments(shape: AttentionShape) -> dict[str, str]:
    query, key = shape.groups * shape.group * shape.head_dim, shape.groups * shape.head_dim
    angle = f"[batch or 1, tokens, {shape.rotary}], the second half as the first"
    return {
        "query_weight": f"[{query}, {shape.hidden}]",
        "key_weight": f"[{key}, {shape.hidden}]",
        "value_weight": f"[{key}, {shape.hidden}]",
        "output_weight": f"[{shape.hidden}, {query}]",
        "query_bias": f"[{query}]",
        "key_bias": f"[{key}]",
        "value_bias": f"[{key}]",
        "output_bias": f"[{shape.hidden}]",
        "query_norm": f"[{shape.head_dim}]",
        "key_norm": f"[{shape.head_dim}]",
        "cos": angle,
        "sin": "as cos",
    }
