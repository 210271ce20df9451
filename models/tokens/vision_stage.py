"""Token selectors that work before the projector, on stock models.

A vision selector leaves fewer features, some of them merged. The stock code, however, counts: one
feature for every placeholder in the prompt. So features that are left are projected alone and put
back where their patch was, and all other places are filled with infinity, a mark that no real
feature bears; before the first decoder layer those tokens are dropped. What the stock code does in
between (tiles put together, line ends added) moves marks and features alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.running.patches import Patches
from planner.models.tokens.selectors import TowerAttention, VisionInputs, select_features
from planner.planning.selectors import Needs, VisionSelector

__all__ = ["VisionStage", "places"]


def places(indices: Tensor, patches: int) -> Tensor:
    """Where the features of a run go, each at its own patch; shape (left,), int64.

    Features that are no patch take free places: before the first patch of the order the first ones,
    otherwise the last ones.

    Args:
        indices: shape (left,), int64: the patch each feature stands at, -1 for none.
        patches: how many places there are.
    """
    order = indices.tolist()
    free = sorted(set(range(patches)) - set(order))
    first = next((n for n, index in enumerate(order) if index >= 0), 0)
    behind = sum(index < 0 for index in order[first:])
    early, late = iter(free), iter(free[len(free) - behind :])
    return indices.new_tensor(
        [i if i >= 0 else next(early if n < first else late) for n, i in enumerate(order)]
    )


class VisionStage:
    """Runs a vision selector between a stock model's vision tower and its projector.

    Args:
        model: a stock image-text model.
        graph: its Graph, which says where tower and projector are.
        selector: what picks.

    Raises:
        InputError: the model has no tower and projector that the selector can work with.
    """

    def __init__(self, model: nn.Module, graph: Graph, selector: VisionSelector) -> None:
        if Needs.TEXT_EMBEDDING in selector.needs:
            raise InputError(
                f"{selector.name} compares patches with the prompt in CLIP's joint space, and "
                f"{type(model).__name__} has no text tower of CLIP"
            )
        self.selector = selector
        self._seen: dict[str, Tensor] = {}
        self._heads: dict[int, int] = {}
        self._hooks: list[RemovableHandle] = []
        projector, source = _projector(graph)
        watched = {"features": source}
        attention = sorted(
            (o for o in graph if o.part == "vision" and o.kind == "attention"),
            key=lambda operator: operator.layer or 0,
        )
        for index in selector.tower_layers:
            query, key = (graph.by_name[name] for name in attention[index].inputs[:2])
            if query.kind != "linear" or key.kind != "linear" or query is key:
                raise InputError(
                    f"{selector.name} ranks by the vision tower's queries and keys, which this "
                    f"tower does not compute separately"
                )
            self._heads[index] = attention[index].integer("heads")
            watched |= {f"query {index}": query.module, f"key {index}": key.module}
        for what, path in watched.items():
            self._watch(model, what, path)
        module = model.get_submodule(projector)
        self._stock: Any = module.forward
        self._patches = Patches()
        self._patches.set(module, "forward", self._project)

    def close(self) -> None:
        """Give the model back as it was."""
        self._patches.undo()
        for hook in self._hooks:
            hook.remove()

    def _watch(self, model: nn.Module, what: str, path: str) -> None:
        """Keep the last output of a module."""

        def keep(_: nn.Module, args: Any, output: Any) -> None:
            self._seen[what] = output if isinstance(output, Tensor) else output[0]

        self._hooks.append(model.get_submodule(path).register_forward_hook(keep))

    def _project(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stands in for the projector: shape (runs, patches, width) to (runs, patches, out)."""
        selection = select_features(self.selector, self._inputs(features))
        self._seen.clear()
        left = torch.cat(selection.features)
        projected = self._stock(left[None], *args, **kwargs)
        if not isinstance(projected, Tensor) or projected.shape[:2] != (1, len(left)):
            raise InputError(
                f"{self.selector.name} picks patches, and this projector merges neighbouring ones; "
                f"use a selector that works in the decoder, such as fastv"
            )
        runs, patches = features.shape[:2]
        most = max(len(indices) for indices in selection.indices)
        if most > patches:
            raise InputError(
                f"{self.selector} makes {most} tokens of an image's {patches}; ask for fewer"
            )
        output = projected.new_full((runs, patches, projected.shape[-1]), torch.inf)
        for run, (indices, part) in enumerate(
            zip(selection.indices, projected[0].split([len(i) for i in selection.indices]))
        ):
            output[run, places(indices, patches)] = part
        return output

    def _inputs(self, features: Tensor) -> VisionInputs:
        patches = features.shape[1]
        whole = self._seen["features"]
        # A CLS token is the one token more that the tower has, in front.
        if whole.shape[1] != patches + 1:
            return VisionInputs(features)
        tower = {}
        for index, heads in self._heads.items():
            query, key = self._seen[f"query {index}"], self._seen[f"key {index}"]
            tower[index] = TowerAttention(query[:, 0], key, heads)
        return VisionInputs(features, whole[:, 0], tower)


def _projector(graph: Graph) -> tuple[str, str]:
    """Module paths of the projector, and of what its features come from."""
    operators = [o for o in graph if o.part == "projector" and o.module]
    linears = [o.module for o in operators if o.kind == "linear"]
    path = _common(linears)
    inside = [o for o in operators if o.module == path or o.module.startswith(f"{path}.")]
    sources = [graph.by_name[name] for o in inside for name in o.inputs]
    source = next((o for o in sources if o.part == "vision"), None)
    if not path or source is None:
        raise InputError(
            f"'{graph.name}' has no projector behind its vision tower; use a selector that works "
            f"in the decoder, such as fastv"
        )
    # The last addition of a layer is what the layer returns.
    return path, source.module


def _common(paths: Iterable[str]) -> str:
    """The innermost module that holds all of them."""
    levels = zip(*(path.split(".") for path in paths))
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))
