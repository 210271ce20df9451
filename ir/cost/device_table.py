"""Devices: peak arithmetic and memory bandwidth, from the table in devices.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from planner.ir.dims import Sizes
from planner.ir.errors import check_known
from planner.ir.graph import Graph, Operator


@dataclass(frozen=True, slots=True)
class Device:
    """One device at half precision, whose operators take what the roofline says."""

    name: str
    tflops: float  # peak dense half-precision matrix arithmetic, 10^12 operations a second
    bandwidth_gb_per_s: float  # peak memory bandwidth, 10^9 bytes a second
    memory_gb: float  # 10^9 bytes
    source: str  # where the figures come from

    @property
    def operations_per_second(self) -> float:
        """Peak operations a second."""
        return self.tflops * 1e12

    @property
    def bytes_per_second(self) -> float:
        """Peak bytes a second."""
        return self.bandwidth_gb_per_s * 1e9

    def roofline(self, operations: int, moved_bytes: int) -> tuple[float, str]:
        """Seconds and what bounds them: ``compute``, ``memory`` or ``-`` where nothing is done."""
        compute = operations / self.operations_per_second
        memory = moved_bytes / self.bytes_per_second
        if not compute and not memory:
            return 0.0, "-"
        return (compute, "compute") if compute > memory else (memory, "memory")

    def on(self, graph: Graph) -> Device:
        """The same for one model, of which more may be known."""
        return self

    def pass_seconds(self, element: int, sizes: Sizes) -> float:
        """What a pass through a model takes besides its operators; `element`: bytes of a number."""
        return 0.0

    def late(self, element: int) -> float:
        """By which share a prompt may take longer than predicted, once in a hundred times."""
        return 0.0

    def time(
        self, operator: Operator, sizes: Sizes, operations: int, elements: int, element: int
    ) -> tuple[float, str]:
        """Seconds of one operator that does so many operations and moves so many elements, of
        `element` bytes each, and what bounds them."""
        return self.roofline(operations, elements * element)


@cache
def devices() -> dict[str, Device]:
    """All known devices by name."""
    text = files("planner.ir.cost").joinpath("devices.yaml").read_text(encoding="utf-8")
    return {name: Device(name, **facts) for name, facts in yaml.safe_load(text).items()}


def device(name: str) -> Device:
    """One device by name; InputError lists the known ones."""
    known = devices()
    check_known("device", name, known)
    return known[name]
