"""Token selectors that work before the projector, on stock models.

The stock code wants one feature for every placeholder in the prompt. So features that are left are
projected alone and put back where their patch was, and all other places are filled with infinity, a
mark that no real feature bears; before the first decoder layer those tokens are dropped. What the
stock code does in between (tiles put together, line ends added) moves marks and features alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.structure import tiles
from planner.ir.vision_tower import Projector, ranking_attention
from planner.models.running.attention_blocks import named, names_of
from planner.models.tokens.selectors import (
    TowerAttention,
    VisionInputs,
    VisionSelection,
    select_features,
)
from planner.models.tokens.text_tower import TextTower
from planner.planning.selectors import CDPruner, Needs, TextGuided, VisionSelector
from planner.planning.selectors.selector import merges_patches

# Argument of models that cut pictures into tiles: (images, 2), height and width.
_SIZES = "image_sizes"


def places(indices: Tensor, patches: int) -> Tensor:
    """Where the features of a run go among `patches` places: each at its own patch, -1 for none.

    Features that are no patch take free places: before the first patch of the order the first ones,
    otherwise the last ones. Shape (left,), int64, to the same.
    """
    order = indices.tolist()
    free = sorted(set(range(patches)) - set(order))
    first = next((n for n, index in enumerate(order) if index >= 0), 0)
    behind = sum(index < 0 for index in order[first:])
    early, late = iter(free), iter(free[len(free) - behind :])
    return indices.new_tensor(
        [i if i >= 0 else next(early if n < first else late) for n, i in enumerate(order)]
    )


class _Local(threading.local):
    """Where one thread is: what the tower has computed, and what was picked for the projector."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self.picked: tuple[Any, int] | None = None
        self.sizes: Tensor | None = None  # of the pictures of a pass, (images, 2), if it says so
        self.patches: Tensor | None = None  # that are left inside the tower, (runs, left)


class VisionStage:
    """Runs a vision selector between a stock model's vision tower and its projector.

    `is_active`: whether this stage is to work now; asked wherever the projector runs, since images
    may be encoded ahead of the model's forward pass.

    Raises InputError: the model has no tower and projector that the selector can work with.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        selector: VisionSelector,
        is_active: Callable[[VisionStage], bool],
    ) -> None:
        self._text = _text_tower(selector, model) if isinstance(selector, TextGuided) else None
        self.selector = selector
        self._is_active = is_active
        self._local = _Local()
        self._heads: dict[int, int] = {}
        self._grid = _TileGrid.of(model, graph) if Needs.TILES in selector.needs else None
        selector.check_in(graph)
        projector = Projector.of(graph)
        # The last addition of a layer is what the layer returns.
        watched = {"features": projector.source.module}
        for index in self.ranking_layers(graph):
            attention, query, key = ranking_attention(graph, index, selector.name)
            self._heads[index] = attention.integer("heads")
            watched |= {f"query {index}": query.module, f"key {index}": key.module}
        self._hooks = [
            model.get_submodule(path).register_forward_hook(partial(self._keep, what))
            for what, path in watched.items()
        ]
        if self._grid is not None:
            self._hooks += [
                module.register_forward_pre_hook(self._note_sizes, with_kwargs=True)
                for module in model.modules()
                if _SIZES in names_of(type(module))
            ]
        module = model.get_submodule(projector.module)
        self._hooks += [
            module.register_forward_pre_hook(self._pick, with_kwargs=True),
            module.register_forward_hook(self._put_back),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model: without what threads are at."""
        return self.__dict__ | {"_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=_Local())

    def close(self) -> None:
        """Give the model back as it was."""
        while self._hooks:
            self._hooks.pop().remove()

    def _keep(self, what: str, _: nn.Module, args: Any, output: Any) -> None:
        """Keep the last output of a module."""
        if self._is_active(self):
            self._local.seen[what] = output if isinstance(output, Tensor) else output[0]

    def _note_sizes(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._local.sizes = named(module, args, kwargs).get(_SIZES)

    def _pick(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the projector, of shape (runs, patches, width): the features that are left."""
        self._local.picked = None
        if not self._is_active(self) or Needs.PROJECTED in self.selector.needs:
            return None
        features, *rest = args
        selection, patches = self.selection(features)
        self._local.seen.clear()
        self._local.picked = selection, patches
        return (torch.cat(selection.features)[None], *rest), kwargs

    def ranking_layers(self, graph: Graph) -> Sequence[int]:
        """Layers of the tower whose queries and keys are looked at."""
        return self.selector.tower_layers

    def selection(self, features: Tensor) -> tuple[VisionSelection, int]:
        """What is left of the features that the projector is given, and of how many patches."""
        return select_features(self.selector, self._inputs(features)), features.shape[1]

    def _put_back(self, _: nn.Module, args: Any, projected: Any) -> Any:
        """Behind it: (1, left, out) as (runs, patches, out), each at its place."""
        if Needs.PROJECTED in self.selector.needs and self._is_active(self):
            features = args[0]
            self._check(projected, features.shape[:2])
            selection = select_features(self.selector, self._inputs(features, projected))
            self._local.seen.clear()
            self._local.picked = selection, features.shape[1]
            projected = torch.cat(selection.features)[None]
        if self._local.picked is None:
            return projected
        (selection, patches), self._local.picked = self._local.picked, None
        counts = [len(indices) for indices in selection.indices]
        self._check(projected, (1, sum(counts)))
        if max(counts) > patches:
            raise InputError(
                f"{self.selector} makes {max(counts)} tokens of an image's {patches}; ask for fewer"
            )
        output = projected.new_full((len(counts), patches, projected.shape[-1]), torch.inf)
        for run, (indices, part) in enumerate(zip(selection.indices, projected[0].split(counts))):
            slots = places(indices, patches)
            # In the selector's order, or each at its own patch.
            slots = slots.sort().values if self.selector.renumbers else slots
            output[run, slots] = part
        return output

    def _check(self, projected: Any, shape: Sequence[int]) -> None:
        """That the projector made one feature of every feature, (runs, patches)."""
        if not isinstance(projected, Tensor) or tuple(projected.shape[:2]) != tuple(shape):
            raise merges_patches(self.selector.name)

    def _inputs(self, features: Tensor, projected: Tensor | None = None) -> VisionInputs:
        runs, patches = features.shape[:2]
        if self._text is not None:
            tower = self._text.to(features.device, features.dtype)
            asked = tower.read(runs, whole=isinstance(self.selector, CDPruner))
            return VisionInputs(
                features,
                patch_embeddings=tower.patches(features),
                text_embeddings=asked,
                projected=projected,
            )
        whole = self._local.seen["features"]
        # A CLS token is the one token more that the tower has, in front.
        has_cls = whole.shape[1] == patches + 1
        if not has_cls and not (self.selector.without_cls and whole.shape[1] == patches):
            return VisionInputs(features)
        attention = {}
        for index, heads in self._heads.items():
            query, key = self._local.seen[f"query {index}"], self._local.seen[f"key {index}"]
            attention[index] = TowerAttention(query[:, 0] if has_cls else query, key, heads)
        cut = None
        if self._grid is not None:
            sizes, self._local.sizes = self._local.sizes, None
            if sizes is None:
                raise InputError(
                    f"{self.selector.name} divides tokens among the tiles of a picture, and "
                    f"nothing says how large it is: call the whole model with {_SIZES}"
                )
            cut = tuple(map(self._grid.tiles, sizes.tolist()))
        return VisionInputs(features, whole[:, 0] if has_cls else None, attention, tiles=cut)


@dataclass(frozen=True)
class _TileGrid:
    """How LLaVA-NeXT cuts pictures into tiles."""

    resolutions: list[list[int]]  # (height, width) that pictures are brought to
    side: int  # of a tile, pixels

    @staticmethod
    def of(model: Any, graph: Graph) -> _TileGrid | None:
        """Of a model; None where it cuts no tiles. InputError where there is no telling how."""
        if tiles(graph)[0] <= 1:
            return None
        resolutions = getattr(model.config, "image_grid_pinpoints", None)
        if resolutions is None:
            raise InputError(
                f"the tiles of a picture cannot be told apart in {type(model).__name__}, so tokens "
                f"cannot be divided among them; use a selector of single tiles, such as fastervlm"
            )
        return _TileGrid(resolutions, model.config.vision_config.image_size)

    def tiles(self, size: list[int]) -> tuple[int, int]:
        """Rows and columns of tiles of a picture (height, width), in pixels."""
        rows, columns = get_anyres_image_grid_shape(size, self.resolutions, self.side)
        return rows, columns


def _text_tower(selector: TextGuided, model: nn.Module) -> TextTower:
    if selector.clip is None:
        raise InputError(
            f"{selector.name} compares patches with the prompt in CLIP's joint space, and "
            f"{type(model).__name__} has no text tower of CLIP: name the folder of the CLIP model "
            f"that its vision tower is of, as in {selector.name}:clip=FOLDER"
        )
    return TextTower(selector.clip)
