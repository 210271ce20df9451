"""``planner devices``: what the roofline knows."""

from __future__ import annotations

from dataclasses import asdict

from planner.cli.output import Json, print_json, table

__all__ = ["devices_command"]


def devices_command(as_json: Json = False) -> None:
    """List the devices of the roofline cost model."""
    from planner.ir.cost.devices import devices

    known = devices().values()
    if as_json:
        print_json({"devices": [asdict(d) for d in known]})
        return
    rows = [
        [d.name, f"{d.tflops:g}", f"{d.bandwidth_gb_per_s:g}", f"{d.memory_gb:g}", d.source]
        for d in known
    ]
    table(["device", "TFLOP/s", "GB/s", "GB", "source"], rows)
