"""What a model under a plan refuses, since others would make something else of it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from planner.ir.errors import InputError
from planner.models.running.program import Program
from planner.models.running.session import Session

# Method of stock models that continuous batching begins with.
BATCHING = "init_continuous_batching"


def check_gradients_come(program: Program) -> None:
    """Raise InputError where DistributedDataParallel would wait for gradients that never come.

    It says so itself, but in the next step, when weights have been changed without an average.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or not torch.is_grad_enabled() or not ddp.require_backward_grad_sync:
        return
    if ddp.find_unused_parameters or ddp.static_graph:
        return
    for layer in program.layers:
        for group in layer.groups:
            left_out = layer.layer.module if not group.on else None
            if group.heads == () and layer.layer.heads is not None:
                left_out = layer.layer.heads.module
            if left_out is not None and any(p.requires_grad for p in left_out.parameters()):
                raise InputError(
                    f"the plan leaves {layer.layer.path} out, at least in part, and "
                    "DistributedDataParallel waits for its gradients: wrap the model with "
                    "find_unused_parameters=True"
                )


class Batching:
    """Stands for the method that continuous batching begins with, and refuses it under a plan.

    It runs the model in a thread of its own, on a cache in pages that no plan can fill, and what is
    raised there is lost.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock method."""
        program, model = self.session.program, self.session.model
        if program is not None and not program.is_dense:
            raise InputError(
                "continuous batching keeps keys and values in pages, which no plan can fill: call "
                "generate, or planner.restore the model before"
            )
        return getattr(type(model), BATCHING)(model, *args, **kwargs)
