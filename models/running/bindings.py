"""From the sites of a Graph to the modules of a loaded model.

Nothing here, and nothing built on it, knows an architecture: module paths and feature layouts come
from the Graph alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from planner.ir.errors import InputError
from planner.ir.graph import Binding, Graph, Site
from planner.ir.intervals import Intervals, merged


@dataclass(frozen=True, eq=False)
class BoundLinear:
    """One linear whose rows (axis ``out``) or columns (axis ``in``) belong to lanes.

    Of a linear with LoRA adapters (peft) there are several: the base layer, and of every adapter
    the half whose rows or columns are the same.
    """

    path: str
    host: nn.Module  # at the place of the linear: itself, or what holds its adapters too
    module: nn.Module  # a Linear, or transformers' Conv1D, which stores its weight transposed
    binding: Binding
    shared: Intervals  # features that belong to no lane; always kept

    @property
    def weight(self) -> Tensor:
        """Shape (out features, in features); a view of the module's own parameter.

        Raises InputError: it was a matrix when the plan was made, and is none any more.
        """
        weight = self.parameter
        if (type(weight) is not nn.Parameter or weight.is_meta) and not _is_matrix(weight):
            raise InputError(
                f"the weights of {self.path} were a plain matrix when the plan was made, and are "
                "quantised or offloaded now: restore the model and compile it again"
            )
        return weight.t() if isinstance(self.module, Conv1D) else weight

    @property
    def parameter(self) -> Tensor:
        """The module's own, as it is stored."""
        return cast(Tensor, self.module.weight)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """What the weight is kept as: itself, or what a parametrisation or a mask makes it of."""
        own = self.module._parameters.get("weight")
        if own is not None:
            return (own,)
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        # ``bias``, ``bias_orig``, ``parametrizations.bias.original``.
        return tuple(v for name, v in named if not re.match(r"(parametrizations\.)?bias", name))

    @property
    def bias(self) -> Tensor | None:
        """Shape (out features,)."""
        return cast("Tensor | None", self.module.bias)

    @property
    def axis(self) -> str:
        """Which features belong to lanes: ``out`` or ``in``."""
        return self.binding.axis

    @property
    def dim(self) -> int:
        """The dimension of `weight` that they are."""
        return 0 if self.axis == "out" else 1

    @cached_property
    def features(self) -> int:
        """Size of the narrowed axis in the base model, also while weights are sharded."""
        is_turned = isinstance(self.module, Conv1D)
        return self.parameter.shape[1 - self.dim if is_turned else self.dim]

    def runs(self, lanes: Intervals) -> Intervals:
        """Features kept with the given lanes, in the order that the weight stores them."""
        return merged([*self.shared, *self.binding.features(lanes)])


@dataclass(frozen=True, eq=False)
class BoundSite:
    """An attention block or MLP and its linears; none where an obstacle says why it stays whole."""

    site: Site
    module: nn.Module
    linears: tuple[BoundLinear, ...]
    obstacle: str = ""

    @property
    def sink(self) -> BoundLinear:
        """The linear that sums over lanes (o_proj, down_proj, fc2, dense)."""
        return next(linear for linear in self.linears if linear.binding.axis == "in")

    @cached_property
    def projects(self) -> bool:
        """Whether the module ends in the sink; BERT's attention leaves that to its caller."""
        return any(module is self.sink.host for module in self.module.modules())

    @property
    def behaviour(self) -> tuple[object, ...]:
        """Equal for blocks of one class and one layout, which behave alike when narrowed."""
        layout = tuple((linear.features, linear.binding.blocks) for linear in self.linears)
        return type(self.module), self.site.lanes, layout


@dataclass(frozen=True, eq=False)
class BoundLayer:
    """A decoder layer and what can be narrowed inside."""

    index: int
    path: str
    module: nn.Module
    heads: BoundSite | None
    mlp: BoundSite | None

    @property
    def paths(self) -> Iterable[str]:
        """Of all modules that belong to it here."""
        yield self.path
        for site in (self.heads, self.mlp):
            if site is not None:
                yield from (site.site.module, *(b.module for b in site.site.bindings))
                yield from (linear.path for linear in site.linears)


def _bound(model: nn.Module, site: Site, binding: Binding) -> list[BoundLinear]:
    """A linear, and the halves of its adapters that share its lanes."""
    host: Any = model.get_submodule(binding.module)
    modules: dict[str, nn.Module] = {binding.module: host}
    if hasattr(host, "base_layer"):
        half = "lora_B" if binding.axis == "out" else "lora_A"
        modules = {f"{binding.module}.base_layer": host.base_layer}
        for name, adapter in getattr(host, half).items():
            modules[f"{binding.module}.{half}.{name}"] = adapter
    return [_bind_linear(path, host, module, site, binding) for path, module in modules.items()]


def _bind_linear(
    path: str, host: nn.Module, module: nn.Module, site: Site, binding: Binding
) -> BoundLinear:
    linear = BoundLinear(path, host, module, binding, ())
    owned = linear.runs(((0, site.lanes),))
    edges = [0, *(edge for run in owned for edge in run), linear.features]
    if edges != sorted(edges):
        raise InputError(
            f"the graph gives {path} {edges[-2]} features and the model has "
            f"{linear.features}; lower the model that is loaded"
        )
    return replace(linear, shared=merged(zip(edges[::2], edges[1::2], strict=True)))


def _obstacle(model: nn.Module, site: Site) -> str:
    """Why a site cannot be narrowed after all; "" where it can."""
    for binding in site.bindings:
        host: Any = model.get_submodule(binding.module)
        linear = getattr(host, "base_layer", host)
        if not isinstance(linear, nn.Linear | Conv1D) or not _is_matrix(linear.weight):
            return f"the weights of {binding.module} are no plain matrix in memory"
        if not _multiplies(linear):
            return f"{binding.module} computes more than a product with its weights"
        # Adapters with a weight of another form, such as DoRA's magnitudes, know all rows.
        if linear is not host and not (
            {"lora_A", "lora_B"} <= host._modules.keys()
            and not any(getattr(host, "lora_variant", {"": "unknown"}).values())
        ):
            return f"the adapters of {binding.module} are no plain LoRA"
    return ""


def _is_matrix(weight: Any) -> bool:
    """Whether this is a whole weight: not packed by quantisation, not left on disk."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.ndim == 2
        and weight.is_floating_point()
        and weight.itemsize > 1
        and not weight.is_meta
    )


@torch.no_grad()
def _multiplies(linear: Any) -> bool:
    """Whether a linear multiplies with its weight, and no more; classes of their own are tried."""
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    tokens = torch.randn(3, linear.weight.shape[1], generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(linear.weight)
    try:
        found = type(linear).forward(linear, tokens)
    except Exception:  # whatever it raises, it is not called with one tensor
        return False
    expected = nn.functional.linear(tokens, linear.weight, linear.bias)
    error = (found.double() - expected.double()).norm()
    return bool(error <= torch.finfo(expected.dtype).eps ** 0.5 * expected.double().norm())


def bind_site(model: nn.Module, site: Site) -> BoundSite:
    """Find the modules of an attention block or MLP."""
    module, obstacle = model.get_submodule(site.module), _obstacle(model, site)
    linears: list[BoundLinear] = []
    if not obstacle:
        for binding in site.bindings:
            linears += _bound(model, site, binding)
    return BoundSite(site, module, tuple(linears), obstacle)


def bind(model: nn.Module, graph: Graph) -> tuple[BoundLayer, ...]:
    """Find the modules of every decoder layer; raises InputError for a Graph of another model."""
    sites: dict[tuple[str, int], Site] = {(s.kind, s.layer): s for s in graph.sites}
    layers = []
    try:
        for index in range(graph.layers):
            layer = sites.get(("layer", index))
            heads, mlp = sites.get(("heads", index)), sites.get(("mlp", index))
            path = layer.module if layer else _layer_path(graph, sites, index)
            layers.append(
                BoundLayer(
                    index,
                    path,
                    model.get_submodule(path),
                    bind_site(model, heads) if heads else None,
                    bind_site(model, mlp) if mlp else None,
                )
            )
    except AttributeError as error:
        raise InputError(
            f"the graph '{graph.name}' is not of this {type(model).__name__}: {error}"
        ) from None
    return tuple(layers)


def _layer_path(graph: Graph, sites: dict[tuple[str, int], Site], index: int) -> str:
    """Path of a layer that cannot be switched off: paths of its sites say where layers count."""
    if not sites:
        raise InputError(f"'{graph.name}' has no layer, attention block or MLP to narrow")
    for kind in ("layer", "heads", "mlp"):
        paths = [(n, site.module.split(".")) for (k, n), site in sites.items() if k == kind]
        for place in range(min((len(parts) for _, parts in paths), default=0)):
            if all(parts[place] == str(layer) for layer, parts in paths):
                return ".".join((*paths[0][1][:place], str(index)))
    raise InputError(f"the graph '{graph.name}' does not say which module is decoder layer {index}")
