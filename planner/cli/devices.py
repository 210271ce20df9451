"""``planner devices``: what the roofline knows."""

from __future__ import annotations

from dataclasses import asdict

from planner.cli.printing import Json, Quiet, Verbose, print_json, table

__all__ = ["devices_command"]


def devices_command(as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the devices of the roofline cost model."""
    from planner.ir.cost.device_table import devices

    known = devices().values()
    if as_json:
        print_json({"devices": [asdict(d) for d in known]})
        return
    if quiet:
        return
    rows = [
        [d.name, f"{d.tflops:g}", f"{d.bandwidth_gb_per_s:g}", f"{d.memory_gb:g}", d.source]
        for d in known
    ]
    headers = ["device", "TFLOP/s", "GB/s", "GB", "source"]
    columns = len(headers) if verbose else len(headers) - 1
    table(headers[:columns], [row[:columns] for row in rows])
