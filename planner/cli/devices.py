"""``planner devices``: what the roofline knows."""

from __future__ import annotations

from dataclasses import asdict

from planner.cli.command_options import command
from planner.cli.console import Console, print_records


@command()
def devices_command(console: Console) -> None:
    """List the devices of the roofline cost model."""
    from planner.ir.cost.device_table import devices

    known = [asdict(device) for device in devices().values()]
    columns = {
        "device": "{name}",
        "TFLOP/s": "{tflops:g}",
        "GB/s": "{bandwidth_gb_per_s:g}",
        "GB": "{memory_gb:g}",
    }
    if console.verbose:
        columns["source"] = "{source}"
    console.show({"devices": known}, lambda: print_records(columns, known))
