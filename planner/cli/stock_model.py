"""A model as commands that look at its weights need it: loaded, lowered, written under a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.command_options import CalibrationData
from planner.ir.graph import Graph
from planner.planning.request import Request
from planner.progress import Say

if TYPE_CHECKING:
    import torch

    from planner.models.export import Exported
    from planner.models.recovery.recovering import Recovering
    from planner.plan import Plan

# As safetensors names them.
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class StockModel:
    """A model with its weights."""

    model: Any
    processor: Any
    graph: Graph
    folder: Path | None  # with its files

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The precision of the weights in its files, which the config need not name."""
        import torch
        from safetensors import safe_open

        found: Counter[str] = Counter()
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            with safe_open(path, "pt") as weights:
                # It is no mapping.
                found.update(weights.get_slice(name).get_dtype() for name in weights.keys())  # noqa: SIM118
        known = [dtype for dtype, _ in found.most_common() if dtype in _DTYPES]
        return getattr(torch, _DTYPES[known[0]]) if known else None

    def recovering(self, recover: str, data: CalibrationData) -> Recovering:
        """A way to recover what plans lose, calibrated on data where there is some."""
        from planner.models.recovery.recovering import Recovering

        known = data.read(self.model, self.processor, recover) if data else None
        return Recovering(self.model, self.graph, recover, known, self.processor)

    def export(
        self, plan: Plan, weights: Mapping[str, Any], output: Path, inputs: dict[str, Any]
    ) -> Exported:
        """Write what a plan keeps, with some weights replaced; inputs are what it is tried on."""
        from planner.models.export import export
        from planner.models.recovery import replaced, storable

        kind = self.stored_dtype
        with replaced(self.model, storable(weights, kind)):
            return export(self.model, self.graph, plan, output, inputs, self.folder, kind)


def load_stock(request: Request, update: Say, dtype: str = "", place: str = "cpu") -> StockModel:
    """Load and lower what a request names, by default in the precision that its config says."""
    from planner.loading import load_model
    from planner.planning.catalog import find_model
    from planner.planning.graph_cache import lowered_graph

    update("load")
    trust = request.trust_remote_code
    dtype = dtype or find_model(request.model, trust).dtype
    model, processor, source = load_model(request.model, dtype, place, trust)
    update("lower")
    return StockModel(model, processor, lowered_graph(source)[0], source.folder)
