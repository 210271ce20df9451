"""Devices: peak arithmetic and memory bandwidth, from the table in devices.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from planner.ir.errors import InputError


@dataclass(frozen=True, slots=True)
class Device:
    """One device at half precision."""

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


@cache
def devices() -> dict[str, Device]:
    """All known devices by name."""
    text = files("planner.ir.cost").joinpath("devices.yaml").read_text(encoding="utf-8")
    return {name: Device(name, **facts) for name, facts in yaml.safe_load(text).items()}


def device(name: str) -> Device:
    """One device by name; InputError lists the known ones."""
    known = devices()
    if name not in known:
        raise InputError(f"unknown device '{name}': choose one of {', '.join(known)}")
    return known[name]
