"""Triton source for the blocks that a plan leaves: one readable file per block shape.

Enters: `Block`s (`planner.kernels.shapes`) and a target. Leaves: `Source`s, text and what is needed
to compile it. A file stands alone: its kernels are those of this folder with the model's and the
plan's numbers in them (`planner.kernels.specialise`), its ``run`` takes stock weights. Which
kernels a block is made of, and their tiles, is not decided here: the block is run on meta tensors,
and the launches that it would make are written down.

A static source holds one plan's survivors. An index-driven one takes them as tensors, so that plans
may change with the input and differ in a batch; it comes from the same kernels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from planner.ir.intervals import print_ranges
from planner.kernels import fused
from planner.kernels.hosts import Step, run_function
from planner.kernels.launch import Launch, recorded
from planner.kernels.predict import predicted_seconds
from planner.kernels.records import (
    AttentionWeights,
    KVCache,
    MLPWeights,
    Norm,
    Survivors,
    neuron_width,
)
from planner.kernels.shapes import AttentionShape, Block, MLPShape, NormShape, Shape, TokenShape
from planner.kernels.specialise import Program
from planner.kernels.tables import Table
from planner.kernels.tiles import Target

__all__ = ["Generated", "Origin", "Source", "generate"]

# What the caller chooses, or the Graph does not know: never a constant.
_GIVEN = frozenset(
    [
        *("rows", "tokens", "length", "scale"),
        *("eps", "offset", "norm_eps", "norm_offset", "head_norm_eps", "head_norm_offset"),
        *("position_stride", "angle_sample_stride", "angle_token_stride"),
    ]
)
# With survivors as data, whether samples share a plan is seen at the launch.
_PLAN_STRIDE = "plan_stride"
_BY_PLAN = ("project_qkv_kernel", "project_up_kernel", "project_out_kernel")
# An index of more pieces than that is read from memory, not computed.
_PIECES = 16


@dataclass(frozen=True)
class Origin:
    """What the head of every file says.

    Attributes:
        model: what the user called it.
        plan: digest of the plan.
        version: of planner.
    """

    model: str
    plan: str
    version: str


@dataclass(frozen=True)
class Generated:
    """One kernel of a source.

    Attributes:
        name: of the function in the file.
        arguments: by parameter name: meta tensors and numbers to compile it for.
        grid: of its launch, for the block's number of tokens.
        warps, stages: of its launch.
        tile: its block sizes.
        seconds: predicted for the block's number of tokens.
    """

    name: str
    arguments: Mapping[str, Any]
    grid: tuple[int, ...]
    warps: int
    stages: int
    tile: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class Source:
    """One generated file.

    Attributes:
        name: of the file, without ``.py``.
        text: Python source.
        block: what it computes.
        kernels: in the order of their launches.
    """

    name: str
    text: str
    block: Block
    kernels: tuple[Generated, ...]


def generate(
    blocks: Iterable[Block],
    target: Target,
    origin: Origin,
    *,
    dtype: torch.dtype = torch.bfloat16,
    index_driven: bool = False,
) -> list[Source]:
    """Sources for the blocks of a plan, tiled for a target.

    Args:
        blocks: from `planner.kernels.shapes.blocks_of`.
        target: architecture.
        origin: for the head of the files.
        dtype: of activations and weights; tiles depend on its size.
        index_driven: survivors as tensors; blocks that differ in survivors alone become one.

    Raises:
        InputError: no tile fits into the target's shared memory.
    """
    sources: list[Source] = []
    for block in _merged(blocks) if index_driven else blocks:
        name = _file_name(block, index_driven, {source.name for source in sources})
        sources.append(_Writer(block, target, dtype, index_driven).source(name, origin))
    return sources


def _merged(blocks: Iterable[Block]) -> list[Block]:
    """Every block with all its survivors, and those that become equal as one."""
    merged: dict[Block, set[int]] = {}
    for block in blocks:
        shape = block.shape
        if isinstance(shape, AttentionShape):
            shape = replace(shape, kept=tuple(range(shape.groups)))
        elif isinstance(shape, MLPShape):
            shape = replace(shape, kept=((0, shape.neurons),))
        else:
            shape = replace(shape, kept=shape.groups, keep=shape.of)
        merged.setdefault(replace(block, shape=shape, layers=()), set()).update(block.layers)
    return [replace(block, layers=tuple(sorted(at))) for block, at in merged.items()]


def _file_name(block: Block, index_driven: bool, taken: set[str]) -> str:
    shape = block.shape
    if isinstance(shape, TokenShape):
        name = "tokens" if index_driven else f"tokens_{shape.keep}_of_{shape.of}"
    else:
        name = "mlp" if isinstance(shape, MLPShape) else "attention"
        if not index_driven:
            kept = shape.count if isinstance(shape, MLPShape) else len(shape.kept)
            name += f"_{kept}"
        name += f"_{block.phase}"
    if block.phase == "prefill":
        name += f"_{block.tokens}"
    names = [name, *(f"{name}_{number}" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


class _Writer:
    """Writes the file of one block.

    `tables` holds the known contents of index tensors; those of too many pieces go to `entries`.
    """

    def __init__(
        self, block: Block, target: Target, dtype: torch.dtype, index_driven: bool
    ) -> None:
        self.block, self.target, self.dtype = block, target, dtype
        self.index_driven = index_driven
        self.tables: dict[str, Table] = {}
        self.entries: dict[str, list[int]] = {}

    def source(self, name: str, origin: Origin) -> Source:
        with recorded(self.target) as launches:
            self.record(self.block.shape)
        program = Program()
        steps = [self.step(program, launch) for launch in launches]
        shape = self.block.shape
        run = run_function(shape, self.summary, steps, [*self.entries], self.index_driven)
        parts = [self.head(origin), self.constants(), program.source, run]
        text = "\n\n".join(part for part in parts if part)
        kernels = tuple(
            Generated(
                step.kernel,
                {p: step.launch.arguments[p] for p in step.parameters},
                step.launch.grid,
                step.launch.warps,
                step.stages,
                {n: v for n, v in step.launch.arguments.items() if n.startswith("BLOCK_")},
                predicted_seconds(step.launch, self.target),
            )
            for step in steps
        )
        return Source(name, text, self.block, kernels)

    def step(self, program: Program, launch: Launch) -> Step:
        """Specialise a launch's kernel to what is known of its arguments."""
        name = launch.kernel.fn.__name__
        given = _GIVEN | ({_PLAN_STRIDE} if self.index_driven else set())
        known = {
            parameter: self.tables.get(parameter, value)
            for parameter, value in launch.arguments.items()
            if parameter in self.tables
            or (parameter not in given and not isinstance(value, Tensor))
        }
        one_plan = name in _BY_PLAN and not self.index_driven
        programs = {1: 0} if one_plan else {}
        made = program.add(launch.kernel, known, programs=programs, generic=(_PLAN_STRIDE,))
        stages = launch.stages
        if name == "project_out_kernel" and "units" in self.tables:
            # Nothing is loaded before the weight any more: see `output.pipeline`.
            stages = (stages + 1) // 2
        return Step(made.name, made.parameters, launch, stages)

    # -- recording ----------------------------------------------------------------------------

    def record(self, shape: Shape) -> None:
        """Run the block on meta tensors, inside `launch.recorded`."""
        if isinstance(shape, AttentionShape):
            self.record_attention(shape)
        elif isinstance(shape, MLPShape):
            self.record_mlp(shape)
        else:
            self.record_tokens(shape)

    def record_attention(self, shape: AttentionShape) -> None:
        block, tensor = self.block, self.tensor
        head_dim = shape.head_dim
        query, key = shape.groups * shape.group * head_dim, shape.groups * head_dim
        sizes = {"query": query, "key": key, "value": key, "output": shape.hidden}
        bias = {name: tensor(sizes[name]) for name in shape.biases}
        head_norm = tensor(head_dim) if shape.head_norm else None
        weights = AttentionWeights(
            query=tensor(query, shape.hidden),
            key=tensor(key, shape.hidden),
            value=tensor(key, shape.hidden),
            output=tensor(shape.hidden, query),
            head_dim=head_dim,
            query_bias=bias.get("query"),
            key_bias=bias.get("key"),
            value_bias=bias.get("value"),
            output_bias=bias.get("output"),
            query_norm=head_norm,
            key_norm=head_norm,
            norm=self.norm(shape.norm),
        )
        meaning = f"The KV group in a slot; {print_ranges(shape.kept)} survive."
        table = Table.of("surviving_group", meaning, shape.kept)
        survivors = self.survivors(table, shape.kept, shape.groups)
        store = tensor(block.batch * survivors.slots * block.context, head_dim)
        angle = tensor(block.batch, block.tokens, shape.rotary)
        hidden = tensor(block.batch, block.tokens, shape.hidden)
        fused.attention(
            hidden,
            weights,
            survivors,
            (angle, angle) if shape.rotary else None,
            self.index(block.batch, block.tokens),
            hidden if shape.residual else None,
            window=shape.window,
            cache=KVCache(store, store, *[self.index(block.batch)] * 3),
            key_positions=self.index(block.batch, block.context),
        )

    def record_mlp(self, shape: MLPShape) -> None:
        tensor = self.tensor
        sizes = {"gate": shape.neurons, "up": shape.neurons, "down": shape.hidden}
        bias = {name: tensor(sizes[name]) for name in shape.biases}
        weights = MLPWeights(
            up=tensor(shape.neurons, shape.hidden),
            down=tensor(shape.hidden, shape.neurons),
            gate=tensor(shape.neurons, shape.hidden) if shape.gated else None,
            activation=shape.activation,
            up_bias=bias.get("up"),
            down_bias=bias.get("down"),
            gate_bias=bias.get("gate"),
            norm=self.norm(shape.norm),
        )
        hidden = tensor(self.block.batch, self.block.tokens, shape.hidden)
        width = neuron_width(shape.neurons)
        lanes = [lane for start, stop in shape.kept for lane in range(start, stop)]
        found = Survivors.of([lanes], shape.neurons, width)
        entries = found.units[0, : int(found.counts[0])].tolist()
        meaning = f"The {width} neurons in a slot; units {print_ranges(entries)} survive."
        table = Table.of("surviving_unit", meaning, entries)
        bits = None if found.lanes is None else found.lanes[0, : len(entries)].tolist()
        survivors = self.survivors(table, entries, shape.neurons // width, width, bits)
        fused.mlp(hidden, weights, survivors, hidden if shape.residual else None)

    def record_tokens(self, shape: TokenShape) -> None:
        batch, tokens, tensor = self.block.batch, self.block.tokens, self.tensor
        plans = 1
        if self.index_driven:
            plans = batch
        else:
            self.tables["counts"] = Table.filled(shape.kept)
        store = tensor(batch * shape.kept * tokens, shape.head_dim)
        fused.select_tokens(
            tensor(batch, tokens, shape.hidden),
            tensor(batch, shape.kept * shape.group, shape.head_dim),
            KVCache(store, store, *[self.index(batch)] * 3),
            Survivors(self.index(plans, shape.kept), self.index(plans)),
            self.index(batch, tokens),
            torch.empty(batch, tokens, dtype=torch.bool, device="meta"),
            self.index(batch),
            tokens - shape.of + shape.keep,
            scale=1.0,
        )

    def survivors(
        self,
        units: Table,
        entries: Sequence[int],
        every: int,
        width: int = 1,
        lanes: Sequence[int] | None = None,
    ) -> Survivors:
        """Index tensors to record with; a static source remembers what is in them.

        Args:
            units: the surviving ones.
            entries: the same, one by one.
            every: units of the base model.
            width: lanes per unit.
            lanes: which lanes of a unit survive, where that is not all of them.
        """
        if self.index_driven:
            plans = self.block.batch
            bits = self.index(plans, every) if width > 1 else None
            return Survivors(self.index(plans, every), self.index(plans), width, bits)
        slots = len(entries)
        self.remember("units", units, entries)
        self.tables["counts"] = Table.filled(slots)
        if lanes is not None:
            meaning = "Bit j is set if neuron j of the unit in a slot survives."
            self.remember("lanes", Table.of("surviving_lanes", meaning, lanes), lanes)
        bits = None if lanes is None else self.index(1, slots)
        return Survivors(self.index(1, slots), self.index(1), width, bits)

    def remember(self, parameter: str, table: Table, entries: Sequence[int]) -> None:
        if len(table.pieces) > _PIECES:
            self.entries[parameter] = [*entries]
        else:
            self.tables[parameter] = table

    def tensor(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device="meta")

    def index(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device="meta")

    def norm(self, shape: NormShape | None) -> Norm | None:
        if shape is None:
            return None
        width = self.block.shape.hidden
        bias = self.tensor(width) if shape.bias else None
        return Norm(self.tensor(width), bias, shape.kind)  # type: ignore[arg-type]

    # -- text ---------------------------------------------------------------------------------

    def head(self, origin: Origin) -> str:
        """The file's docstring and imports."""
        block, shape = self.block, self.block.shape
        dtype = str(self.dtype).removeprefix("torch.")
        title = shape.title
        if self.index_driven:
            title = f"{title.partition(',')[0]}, survivors as tensors"
        what = "layer" if len(block.layers) == 1 else "layers"
        tokens = f"{block.tokens} token{'s' * (block.tokens > 1)}"
        lines = [
            f'"""{title[0].upper()}{title[1:]}: {block.phase}, sm_{self.target.capability}.',
            "",
            f"Model {origin.model}, {what} {print_ranges(block.layers)}; plan {origin.plan}.",
            f"Tiled for batch {block.batch}, {tokens}, {dtype}; other numbers of these run too.",
            f"Written by planner {origin.version}: compile again, do not edit.",
            '"""',
        ]
        imports = ["import torch", "import triton", "import triton.language as tl"]
        if self.entries:
            imports = ["import functools", "", *imports]
        return "\n".join([*lines, "", *imports]) + "\n"

    def constants(self) -> str:
        """Index tensors with too many pieces to compute."""
        if not self.entries:
            return ""
        rows = []
        for name, entries in self.entries.items():
            numbers = textwrap.fill(", ".join(map(str, entries)), 92)
            rows.append(f'    "{name}": [\n{textwrap.indent(numbers, " " * 8)},\n    ],')
        body = "\n".join(rows)
        return f"""# Surviving units, slot by slot.
TABLES = {{
{body}
}}


@functools.cache
def table(name, device):
    return torch.tensor([TABLES[name]], dtype=torch.int32, device=device)
"""

    @property
    def summary(self) -> str:
        """What ``run`` gives."""
        shape = self.block.shape
        if isinstance(shape, TokenShape):
            return (
                "The tokens that stay, [batch, length, hidden], right-aligned, zeros in front; and "
                "their indices, [batch, length] int32, -1 in front."
            )
        name = "MLP" if isinstance(shape, MLPShape) else "attention"
        inner = "norm(hidden)" if shape.norm else "hidden"
        text = f"{'residual + ' if shape.residual else ''}{name}({inner}), [batch, tokens, hidden]."
        if isinstance(shape, AttentionShape):
            text += (
                " Keys and values go into the cache behind `lengths`; advancing these is the "
                "caller's."
            )
        return text
