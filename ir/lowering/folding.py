"""Folding: layers that are alike are captured once; the others get copies of what is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from planner.ir.graph import Operator, Site
from planner.ir.lowering.capture import Stack

Narrowing = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Span:
    """The operators of a traced layer: `start` to `stop`, and the names of its input and output."""

    start: int
    stop: int
    entry: str
    end: str


def moved(path: str, old: str, new: str) -> str:
    """The path with one leading module path replaced by another."""
    if path == old or path.startswith(old + "."):
        return new + path[len(old) :]
    return path


def layer_of(path: str, stacks: Iterable[str]) -> int | None:
    """Index of the outermost stack entry that a module path lies in."""
    for stack in sorted(stacks, key=len):
        if path.startswith(stack + "."):
            return int(path[len(stack) + 1 :].split(".")[0])
    return None


def copies(
    operators: Iterable[Operator],
    like: str,
    path: str,
    renamed: dict[str, str],
    unique: Callable[[str], str],
    layer: Callable[[str], int | None],
) -> list[Operator]:
    """A layer's operators, in order, whose path is `like`, under another path.

    To `renamed`, name of the traced layer's input -> of the copy's, the operators' names are added.
    `unique` makes of a wished name one that is not taken yet; `layer` gives the index of a module's
    layer.
    """
    copied = []
    for operator in operators:
        module = moved(operator.module, like, path)
        name = unique(moved(operator.name, like, path))
        renamed[operator.name] = name
        inputs = tuple(dict.fromkeys(renamed.get(i, i) for i in operator.inputs))
        copy = replace(operator, name=name, module=module, inputs=inputs, layer=layer(module))
        copied.append(copy)
    return copied


def sites_alike(stack: Stack, prefix: str, found: Mapping[int, list[Site]]) -> list[Site]:
    """Sites of all layers of a stack, which has a path in the model; `found` are those of the
    traced layers by index."""
    sites: list[Site] = []
    for index, kind in enumerate(stack.kinds):
        like, path = f"{prefix}.{kind}", f"{prefix}.{index}"
        for site in found.get(kind, []):
            bindings = tuple(replace(b, module=moved(b.module, like, path)) for b in site.bindings)
            name, module = f"{site.kind}.{index}", moved(site.module, like, path)
            sites.append(replace(site, name=name, layer=index, module=module, bindings=bindings))
    return sites


def narrowed_alike(
    operators: Iterable[Operator],
    stack: Stack,
    prefix: str,
    sites: Iterable[Site],
    narrowed: Mapping[str, Narrowing],
    kv_lanes: Mapping[str, int],
) -> list[Operator]:
    """Operators of a module with what narrows them; stack, prefix and sites are those of
    `sites_alike`.

    `narrowed`: name of a traced operator -> pairs (quantity, kind of site). `kv_lanes`: name of a
    traced attention -> its number of KV heads.
    """
    names = {site.name for site in sites}
    result = []
    for operator in operators:
        if operator.layer is not None and operator.module.startswith(prefix + "."):
            kind = stack.kinds[operator.layer]
            traced = moved(operator.name, f"{prefix}.{operator.layer}", f"{prefix}.{kind}")
            pairs = ((what, f"{k}.{operator.layer}") for what, k in narrowed.get(traced, ()))
            operator = replace(operator, narrowed_by=tuple(p for p in pairs if p[1] in names))
            if traced in kv_lanes:
                operator = operator.having(kv_heads=kv_lanes[traced])
        result.append(operator)
    return result
