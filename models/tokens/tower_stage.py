"""Token selectors that work inside the vision tower, on stock models.

Before some of its layers patches are dropped; those behind run on the patches that are left, as
does the projector. What the projector makes of them is put in place as for any other vision
selector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from planner.ir.cost import price, total
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.passes import NarrowPatches, run
from planner.ir.vision_tower import VisionTower, common
from planner.models.running.attention_blocks import named
from planner.models.running.encoders import note_left_out
from planner.models.tokens.selectors import LayerAttention, VisionSelection, select_patches
from planner.models.tokens.vision_stage import VisionStage
from planner.planning.selectors import PatchStage, TowerSelector

_ONE_IMAGE = {"batch": 1, "images": 1}


class TowerStage(VisionStage):
    """Runs a tower selector between the layers of a stock model's vision tower.

    Raises InputError: the model has no tower that the selector can work in.
    """

    selector: TowerSelector

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        selector: TowerSelector,
        is_active: Callable[[VisionStage], bool],
    ) -> None:
        self._tower = VisionTower.of(graph)
        self._stages = selector.stages_in(graph)
        self._left_out = _flops_left_out(graph, self._stages) // self._tower.runs
        super().__init__(model, graph, selector, is_active)
        for number, stage in enumerate(self._stages):
            inside = (o for o in graph if o.part == "vision" and o.layer == stage.layer)
            layer = model.get_submodule(common(o.module for o in inside))
            hook = partial(self._drop, number)
            self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    @override
    def ranking_layers(self, graph: Graph) -> Sequence[int]:
        return sorted({layer for stage in self._stages for layer in _scored(stage)})

    def _drop(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before a layer: its arguments, of the patches that are left."""
        if not self._is_active(self):
            return None
        (first, hidden), *others = named(module, args, kwargs).items()
        for name, value in others:
            if isinstance(value, Tensor) and hidden.shape[1] in value.shape:
                raise InputError(
                    f"{self.selector.name} drops patches inside the vision tower, and layers of "
                    f"this one are given more of each patch than its features: {name}"
                )
        stage = self._stages[number]
        layers = [self._attention(layer) for layer in _scored(stage)]
        index = select_patches(self.selector, layers, stage.keep)
        if number:
            assert self._local.patches is not None
            self._local.patches = self._local.patches.gather(1, index)
        else:
            self._local.patches = index
            note_left_out(len(index) * self._left_out)
        places = torch.cat([index.new_zeros(len(index), 1), index + 1], dim=1)
        left = hidden.take_along_dim(places[:, :, None], 1)
        return ((left, *args[1:]), kwargs) if args else (args, kwargs | {first: left})

    def _attention(self, layer: int) -> LayerAttention:
        """What one of its layers has computed with, which is forgotten then."""
        query, key = (
            self._local.seen.pop(f"{what} {layer}").detach().unflatten(-1, (self._heads[layer], -1))
            for what in ("query", "key")
        )
        every = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
        mask = every[:, None, None].expand(-1, -1, query.shape[1], -1)
        return LayerAttention(query.transpose(1, 2), key.transpose(1, 2), every, mask=mask)

    @override
    def selection(self, features: Tensor) -> tuple[VisionSelection, int]:
        patches, self._local.patches = self._local.patches, None
        if patches is None or patches.shape != features.shape[:2]:
            raise InputError(
                f"{self.selector.name} drops patches inside the vision tower, and this model's "
                f"projector is given others than those that are left"
            )
        return VisionSelection(tuple(features), tuple(patches)), self._tower.patches


def _scored(stage: PatchStage) -> range:
    """Layers that its patches are scored by."""
    return range(stage.layer - stage.scored, stage.layer)


def _flops_left_out(graph: Graph, stages: tuple[PatchStage, ...]) -> int:
    """FLOPs of one image that are saved in front of the decoder, less what choosing takes."""
    whole, narrow = (
        total(price(o, g, _ONE_IMAGE) for o in g if o.part in ("vision", "projector"))
        for g in (graph, run(graph, [NarrowPatches(stages)]))
    )
    return whole.flops - narrow.flops
