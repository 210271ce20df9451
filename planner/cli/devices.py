"""``planner devices``: what the roofline knows."""

from __future__ import annotations

from dataclasses import asdict

from planner.cli.command_options import command
from planner.cli.console import Console, table


@command()
def devices_command(console: Console) -> None:
    """List the devices of the roofline cost model."""
    from planner.ir.cost.device_table import devices

    known = devices().values()
    rows = [
        [d.name, f"{d.tflops:g}", f"{d.bandwidth_gb_per_s:g}", f"{d.memory_gb:g}", d.source]
        for d in known
    ]
    headers = ["device", "TFLOP/s", "GB/s", "GB", "source"]
    columns = len(headers) if console.verbose else len(headers) - 1
    console.show(
        {"devices": [asdict(device) for device in known]},
        lambda: table(headers[:columns], [row[:columns] for row in rows]),
    )
