"""The vision side of a model: its encoder and projector, captured and raised."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from planner.ir.dims import Dim
from planner.ir.graph import Operator
from planner.ir.lowering.aten import HEAVY, opname
from planner.ir.lowering.attempts import NotLowered, first_success, sentence
from planner.ir.lowering.capture import Captured, capture, path_of
from planner.ir.lowering.example_inputs import vision_inputs
from planner.ir.lowering.raising import Raised, Surroundings, raise_operators


@dataclass(frozen=True)
class VisionSide:
    """Operators from pixels to image features."""

    # In order; none where there is no vision side, or it could not be captured.
    operators: tuple[Operator, ...] = ()
    output: str = ""  # name of the operator whose output the decoder takes
    tokens: int = 0  # image features for each run of the encoder
    notes: tuple[str, ...] = ()  # what was left out and why, one sentence each


class _ImageFeatures(nn.Module):
    """Makes a module of a model's ``get_image_features``, so that it can be captured."""

    def __init__(self, root: nn.Module, function: Callable[..., Any], config: Any) -> None:
        super().__init__()
        self.root, self.function, self.config = root, function, config

    def forward(self, **inputs: Any) -> Any:
        return self.function(**inputs)


def features_of(model: Any) -> Callable[..., Any] | None:
    """The model's own function from pixels to image features, or to those of videos."""
    owners = (model, getattr(model, "model", None), getattr(model, "base_model", None))
    functions = (
        getattr(owner, f"get_{kind}_features", None)
        for kind in ("image", "video")
        for owner in owners
    )
    return next((f for f in functions if f is not None), None)


def encoder_of(model: Any) -> nn.Module | None:
    """The encoder of images; None where there is none, or it is all of the model."""
    for kind in ("image", None) if hasattr(model, "get_encoder") else ():
        encoder = model.get_encoder(kind)
        sees = kind or "pixel_values" in inspect.signature(encoder.forward).parameters
        if sees and isinstance(encoder, nn.Module) and encoder is not model:
            return encoder
    return None


def vision_config_of(model: Any) -> Any:
    """What configures it."""
    return (
        getattr(model.config, "vision_config", None)
        or getattr(encoder_of(model), "config", None)
        or model.config
    )


def _attempts(
    model: Any, encoder: nn.Module | None, function: Callable[..., Any] | None
) -> Iterator[Callable[[], tuple[Captured, bool]]]:
    """Ways to capture: (the captured module, whether the projector is in it)."""
    config = vision_config_of(model)
    modules: list[tuple[nn.Module, Callable[..., Any], bool]] = []
    if encoder is not None:
        modules.append((encoder, encoder.forward, False))
    if function is not None:
        whole = (_ImageFeatures(model, function, model.config), function, True)
        # The exporter prepares grids for encoders; those project as well.
        last = any("grid_thw" in inspect.signature(f).parameters for _, f, _ in modules)
        modules.insert(len(modules) if last else 0, whole)
    for module, signature, projects in modules:
        module.eval()
        for inputs in vision_inputs(config, signature):
            tensors = {n: v for n, v in inputs.items() if isinstance(v, Tensor)}
            names = tuple(n for n, v in tensors.items() if v.is_meta and v.is_floating_point())
            yield partial(_captured, module, inputs, names, projects)


def _captured(
    module: nn.Module, inputs: dict[str, Any], names: tuple[str, ...], projects: bool
) -> tuple[Captured, bool]:
    captured = capture(module, inputs, names)
    for node in captured.graph.nodes:
        value = node.meta.get("val")
        if opname(node) in HEAVY and isinstance(value, Tensor) and not value.numel():
            raise NotLowered("its sizes depend on what the image shows")
    return captured, projects


def lower_vision(model: Any, width: int) -> VisionSide:
    """Lower the vision side of a model on the meta device, whose decoder's hidden state has a
    `width`, through its own ``get_image_features`` where that works."""
    encoder, function = encoder_of(model), features_of(model)
    if encoder is None and function is None:
        return VisionSide()
    # Patches may go to the decoder through a projector alone.
    path = "" if encoder is None else path_of(model, encoder)
    found, failure = first_success(_attempts(model, encoder, function))
    because = f" ({sentence(failure)})" if failure is not None else ""
    if found is None:
        return VisionSide(notes=(f"vision side left out{because}",))
    captured, projects = found

    def part(module: str) -> str:
        return "vision" if path and (module + ".").startswith(path + ".") else "projector"

    prefix = "" if projects else path + "."
    raised = raise_operators(captured, Surroundings(prefix, part, "images"))
    features = _image_features(raised, width)
    if features is None:
        return VisionSide(tuple(raised.operators), raised.operators[-1].name)
    if not projects:
        raised = _with_projector(raised, features)
        projects = any(operator.part == "projector" for operator in raised.operators)
    notes: tuple[str, ...] = ()
    if features.shape[-1] != Dim(width):
        why = f"the projector was not captured{because}"
        if projects:
            why = "the config disagrees with itself"
        notes = (f"image features are {features.shape[-1]} wide, the decoder {width}: {why}",)
    return VisionSide(tuple(raised.operators), features.name, _rows(features), notes)


def _image_features(raised: Raised, width: int) -> Operator | None:
    """The output of the vision side that the decoder takes: rows as wide as it, if any are.

    One vector for the whole image is not it while there is another output.
    """
    found = [operator for operator in raised.operators if operator.name in raised.outputs]
    tokens = [operator for operator in found if _rows(operator) > 1] or found
    fitting = [operator for operator in tokens if operator.shape[-1] == Dim(width)]
    return next(reversed(fitting or tokens), None)


def _rows(operator: Operator) -> int:
    """Rows of an output for each run of the encoder."""
    return math.prod(dim.constant for dim in operator.shape[1:-1])


def _with_projector(raised: Raised, features: Operator) -> Raised:
    """Tell an encoder's own projector from its layers: the linears between those and the output."""
    known = {operator.name: operator for operator in raised.operators}
    pending, tail = [features.name], set()
    while pending:
        operator = known[pending.pop()]
        if operator.layer is None and operator.name not in tail:
            tail.add(operator.name)
            pending += operator.inputs
    kinds = {known[name].kind for name in tail}
    if "linear" not in kinds or "input" in kinds:
        return raised
    operators = [
        replace(operator, part="projector") if operator.name in tail else operator
        for operator in raised.operators
    ]
    return replace(raised, operators=operators)
