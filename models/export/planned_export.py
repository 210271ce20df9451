"""Planned exports: narrowed weights that any plan may have, and what loads them.

The folder looks like the base model's, but the weights have a name of their own: a stock loader,
which would fill what is missing with random numbers, finds none and says so.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from planner.documents import of_format, read_json
from planner.ir.errors import InputError, first_line
from planner.ir.graph import Graph
from planner.ir.intervals import count_of
from planner.ir.lowering.decoder import decoder_of
from planner.models import projectors
from planner.models.export.weights import cast, kept_weights
from planner.models.running.attention_blocks import AttentionBlock, headless, probe
from planner.models.running.kv_cache import cache_among
from planner.models.running.program import Program
from planner.planning.catalog import PLANNED_EXPORT

FORMAT = 1
RECORD = PLANNED_EXPORT
_WEIGHTS = "planner{suffix}.safetensors"


def save_planned(
    model: Any,
    graph: Graph,
    program: Program,
    folder: Path,
    stored_dtype: torch.dtype | None,
    **facts: str,
) -> None:
    """Write the base config, a record of what is narrowed, and the weights.

    The program is of one plan without token stages, the folder empty; `stored_dtype` is as for
    `planner.models.export.export`, and `facts` are further keys of what describes the checkpoint.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    off = {
        layer.layer.path: layer.layer.index for layer in program.layers if not layer.groups[0].on
    }
    record = {
        "planner_export": FORMAT,
        **facts,
        "skipped_layers": off,
        "attention": _attention(model, graph, program),
    }
    state = cast(kept_weights(model, program), stored_dtype)
    skipped = tuple(f"{path}." for path in off)
    for name, buffer in model.named_buffers():
        # Those that a model computes as it is built, which `load` does without.
        if name not in state and not name.startswith(skipped):
            state[name] = buffer
    record["shared"] = _take_shared(state)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    save_torch_state_dict(state, folder, filename_pattern=_WEIGHTS)


def _take_shared(state: dict[str, Tensor]) -> dict[str, str]:
    """Take out weights that stand under another name as well: name -> that other name."""
    first: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}
    for name, value in list(state.items()):
        key = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and first.setdefault(key, name) != name:
            shared[name] = first[key]
            del state[name]
    return shared


def _attention(model: Any, graph: Graph, program: Program) -> dict[str, Any]:
    """Path of a narrowed attention block -> attributes to change, or what stands in for it."""
    blocks: dict[Any, AttentionBlock] = {}
    found: dict[str, Any] = {}
    for layer in program.layers:
        site, lanes = layer.layer.heads, layer.groups[0].heads
        if site is None or lanes is None or not layer.groups[0].on:
            continue
        if site.behaviour not in blocks:
            width = int(graph.properties["hidden_size"])
            blocks[site.behaviour] = probe(decoder_of(model), site, width)
        block = blocks[site.behaviour]
        by_head = block.arguments or block.parameters or any(block.handed_on)
        if by_head or block.added or not site.projects:
            raise InputError(
                f"the heads of {site.site.module} cannot be exported: more of "
                f"{type(site.module).__name__} than its linears is by head; plan without head "
                f"switches"
            )
        changes: dict[str, Any]
        if not lanes:
            silent = {"layer": layer.layer.index, "sink": site.sink.path, "output": block.output}
            changes = {"silent": silent}
        else:
            kept = count_of(lanes)
            changes = {owner: block.changes(kept, owner) for owner in ("module", "config")}
        if any(changes.values()):
            found[site.site.module] = changes
    return found


def load(folder: str | Path) -> Any:
    """Load an exported model, on the CPU, in evaluation mode.

    Takes both forms; a plain one is loaded as stock transformers does. Raises InputError where the
    folder holds none, or a broken one.
    """
    folder = Path(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        name = config.architectures[0]
        model_class = getattr(projectors if hasattr(projectors, name) else transformers, name)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        raise InputError(f"'{folder}' holds no model that can be loaded") from None
    if not (folder / RECORD).is_file():
        return model_class.from_pretrained(folder, dtype="auto").eval()
    record = of_format(
        read_json(folder / RECORD, "export"), "planner_export", FORMAT, folder / RECORD, "export"
    )
    try:
        state: dict[str, Tensor] = {}
        for path in sorted(folder.glob(_WEIGHTS.format(suffix="*"))):
            state |= load_file(path)
    except Exception as error:
        raise InputError(f"the export in '{folder}' is broken: {first_line(error)}") from None
    with torch.device("meta"), no_init_weights():
        model = model_class(config)
    for path, index in record["skipped_layers"].items():
        layer = model.get_submodule(path)
        layer._modules.clear()
        layer.forward = _Skipped(index)
    _fill(
        model,
        config.dtype,
        state | {name: state[other] for name, other in record["shared"].items()},
    )
    for path, changes in record["attention"].items():
        _change_attention(model, model.get_submodule(path), changes)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise InputError(f"the export in '{folder}' lacks {missing[0]}")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _fill(model: Any, dtype: torch.dtype, state: Mapping[str, Tensor]) -> None:
    """Put weights in place, whatever their sizes, in the precision that the config names."""
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = value
            continue
        value = value.to(dtype) if value.is_floating_point() else value
        module._parameters[leaf] = nn.Parameter(value, requires_grad=value.is_floating_point())
        if leaf == "weight" and isinstance(module, nn.Linear):
            module.out_features, module.in_features = value.shape
        elif leaf == "weight" and isinstance(module, Conv1D):
            module.nx, module.nf = value.shape
    # What was one parameter under two names is one again.
    model.tie_weights()


def _change_attention(model: Any, block: Any, changes: Mapping[str, Any]) -> None:
    if "silent" in changes:
        silent = changes["silent"]
        sink = model.get_submodule(silent["sink"])
        block.forward = _Silent(silent["layer"], sink, silent["output"])
        return
    for name, value in changes["module"].items():
        setattr(block, name, value)
    if changes["config"]:
        block.config = copy.copy(block.config)
        for name, value in changes["config"].items():
            setattr(block.config, name, value)


def _count(index: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
    """Let the cache know how many tokens came: one number a token.

    Stock code asks the first layer how many it has seen, so one without keys still counts.
    """
    cache = cache_among(kwargs)
    if cache is not None:
        counter = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        cache.update(counter, counter, index)


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


@dataclass(frozen=True, eq=False)
class _Skipped:
    """Forward of a decoder layer that is off."""

    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = _hidden(args, kwargs)
        _count(self.index, hidden, kwargs)
        return hidden


@dataclass(frozen=True, eq=False)
class _Silent:
    """Forward of an attention block without heads."""

    index: int
    sink: Any
    output: Sequence[bool] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden(args, kwargs)
        _count(self.index, hidden, kwargs)
        return headless(hidden, self.sink.bias, self.output)
