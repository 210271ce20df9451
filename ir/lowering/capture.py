"""Capture: from a stock model's module to an ATen graph, without weights.

`torch.export` traces on the meta device. Layers of a stack that are alike are traced once: the
first of each kind between two marks, the others become a single ``fold`` mark.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from planner.ir.lowering.rewrites import fuse_attention, join_writes, use_linear

# A module that wraps a model, to have one of its functions traced, keeps the model under this name;
# paths leave it out.
WRAPPED = "root"


def _bare(path: str) -> str:
    return path.removeprefix(WRAPPED).removeprefix(".") if path.startswith(WRAPPED) else path


@torch.library.custom_op("planner_ir::mark", mutates_args=())
def mark(hidden: Tensor, role: str, path: str) -> Tensor:
    """Identity that stays visible in the captured graph: begin, end or fold of a stack's layer."""
    return hidden.clone()


@mark.register_fake
def _(hidden: Tensor, role: str, path: str) -> Tensor:
    return torch.empty_like(hidden)


@dataclass(frozen=True)
class Stack:
    """A module list whose entries are called one after another on the same hidden state; `kinds`
    gives for each the index of the first entry that it is like."""

    path: str
    kinds: tuple[int, ...]


@dataclass(frozen=True)
class Captured:
    """The ATen graph of one module."""

    graph: fx.Graph  # nodes with ``meta["val"]`` (shapes) and ``meta["nn_module_stack"]``
    parameters: dict[str, str]  # placeholder name -> parameter or buffer path inside the module
    stacks: dict[str, Stack]  # the module lists that were folded
    leaves: frozenset[str]  # paths of modules without children
    inputs: tuple[str, ...]  # placeholder names of the activations that enter


def build_on_meta(config: Any, from_config: Callable[[Any], Any]) -> nn.Module:
    """Build a model from its config with shapes only, in evaluation mode."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = from_config(config)
        model.tie_weights()
    module: nn.Module = model.eval()
    return module


def path_of(model: nn.Module, module: nn.Module) -> str:
    """Path of a module inside a model, "" where it is not there."""
    return next((path for path, child in model.named_modules() if child is module), "")


def _signature(layer: nn.Module) -> object:
    """What makes two layers alike: classes, parameter shapes and settings, indices aside."""
    settings = []
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and not name.endswith(
                ("idx", "index", "_id", "layer_number")
            ):
                settings.append((path, name, value))
    shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in layer.named_parameters())
    buffers = tuple((n, tuple(b.shape)) for n, b in layer.named_buffers())
    classes = tuple((path, type(module)) for path, module in layer.named_modules())
    return classes, shapes, buffers, tuple(sorted(settings, key=repr))


def find_stacks(module: nn.Module) -> dict[str, Stack]:
    """Module lists of at least two layers that have children of their own."""
    stacks = {}
    for path, child in module.named_modules():
        if not isinstance(child, nn.ModuleList) or len(child) < 2:
            continue
        if any(isinstance(layer, nn.ModuleList) or not list(layer.children()) for layer in child):
            continue
        first: dict[object, int] = {}
        kinds = tuple(first.setdefault(_signature(layer), i) for i, layer in enumerate(child))
        stacks[path] = Stack(_bare(path), kinds)
    return stacks


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The activation a layer works on: its first floating-point tensor argument."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, torch.Size]:
    """Shapes of a layer's tensor arguments, by position or name."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {name: value.shape for name, value in named if isinstance(value, Tensor)}


class _Marker:
    """Replaces the forward of one stack entry while it is traced.

    A layer is folded into the one it is like only where their arguments have the same shapes:
    attention in windows and over the whole image differ in nothing else.
    """

    def __init__(self, layer: nn.Module, path: str, like: str, outputs: dict[str, Any]) -> None:
        self.layer, self.path, self.like, self.outputs = layer, path, like, outputs
        self.forward = layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden(args, kwargs)
        if hidden is None:
            return self.forward(*args, **kwargs)
        shapes = _shapes(args, kwargs)
        if self.like != self.path and self.like in self.outputs:
            template, known = self.outputs[self.like]
            if all(shapes[name] == known[name] for name in shapes.keys() & known.keys()):
                folded = mark(hidden, "fold", self.path)
                return (folded, *template[1:]) if isinstance(template, tuple) else folded
        begun = mark(hidden, "begin", self.path)
        args = tuple(begun if a is hidden else a for a in args)
        kwargs = {k: begun if v is hidden else v for k, v in kwargs.items()}
        output = self.forward(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or first.shape != hidden.shape:
            return output
        self.outputs[self.path] = (output, shapes)
        ended = mark(first, "end", self.path)
        return (ended, *output[1:]) if isinstance(output, tuple) else ended


@contextlib.contextmanager
def folded(module: nn.Module, stacks: dict[str, Stack]) -> Iterator[None]:
    """Trace like layers once: swap the forward of every stack entry for a `_Marker`."""
    outputs: dict[str, Any] = {}
    changed: list[nn.Module] = []
    try:
        for path, stack in stacks.items():
            layers = module.get_submodule(path)
            assert isinstance(layers, nn.ModuleList)
            for index, layer in enumerate(layers):
                if "forward" in vars(layer):
                    continue
                layer.forward = _Marker(
                    layer, f"{stack.path}.{index}", f"{stack.path}.{stack.kinds[index]}", outputs
                )
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


class _Slices(TorchFunctionMode):
    """Has what a list picks of a tensor, one after another, be a slice.

    Of a list the trace would have the shape alone, and not say which features it picks.
    """

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__:
            args = (args[0], _sliced(args[1]))
        return func(*args, **(kwargs or {}))


def _sliced(place: Any) -> Any:
    places = place if isinstance(place, tuple) else (place,)
    lists = [one for one in places if isinstance(one, list)]
    basic = all(one is None or one is ... or isinstance(one, list | slice) for one in places)
    if len(lists) != 1 or not lists[0] or not basic or not all(type(n) is int for n in lists[0]):
        return place
    first, last = lists[0][0], lists[0][-1]
    if lists[0] != list(range(first, last + 1)):
        return place
    run = slice(first, last + 1 or None)
    return tuple(run if isinstance(one, list) else one for one in places)


def _settled(value: Any, unknown: int) -> Any:
    """A traced value with sizes that depend on data replaced by what they amount to here."""
    if isinstance(value, list | tuple):
        return [_settled(v, unknown) for v in value]
    if not isinstance(value, Tensor):
        return value
    shape = []
    for size in value.shape:
        if not isinstance(size, int):
            expression = size.node.expr
            size = int(expression.subs(dict.fromkeys(expression.free_symbols, unknown)))
        shape.append(size)
    return torch.empty(shape, dtype=value.dtype, device="meta")


def capture(
    module: nn.Module, inputs: dict[str, Any], activations: tuple[str, ...], unknown: int = 1
) -> Captured:
    """Trace `module(**inputs)` into an ATen graph.

    Args:
        module: on the meta device, in evaluation mode.
        inputs: tensors on the meta device, or on the CPU where the exporter has to read their
            values (image grids).
        activations: names of the inputs that carry activations (not masks or positions).
        unknown: what a count amounts to that depends on the data (images that are not padding).

    Raises whatever `torch.export` raises where the module cannot be traced.
    """
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
    from transformers.utils import logging

    stacks = find_stacks(module)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    # Where each operation was called from would take a quarter of the time, and nobody asks.
    traces = getattr(fx.config, "do_not_emit_stack_traces", False)
    fx.config.do_not_emit_stack_traces = True
    try:
        with folded(module, stacks), _Slices(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exporter, config = DynamoExporter(), DynamoConfig()
            if hasattr(exporter, "export_program"):
                program, _ = exporter.export_program(module, dict(inputs), config)
            else:  # older versions of transformers
                with torch.no_grad():
                    program = exporter.export(module, dict(inputs), config)
    finally:
        logging.set_verbosity(verbosity)
        fx.config.do_not_emit_stack_traces = traces
    signature = program.graph_signature
    for node in program.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = _settled(node.meta["val"], unknown)
    parameters = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    parameters = {name: _bare(path) for name, path in parameters.items()}
    leaves = frozenset(_bare(p) for p, m in module.named_modules() if p and not list(m.children()))
    entering = tuple(
        node.name
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name.split(".")[0] in activations
    )
    join_writes(program.graph)
    use_linear(program.graph, signature.inputs_to_parameters)
    fuse_attention(program.graph, entering)
    by_path = {stack.path: stack for stack in stacks.values()}
    return Captured(program.graph, parameters, by_path, leaves, entering)
