"""What an operator costs: FLOPs, bytes moved, seconds, KV bytes, parameters, peak memory.

Enters: a Graph, a `Workload` and (for seconds) a device. Leaves: a `Cost` per operator.

    workload         token counts of a request
    device_table     the devices, from devices.yaml
    measured_device  a device that takes what was measured
    price            an operator's `Cost`: exact FLOPs, seconds on a device; `total`
    memory           peak bytes of a step
    conventions      how published tables count, oddities included
"""

from planner.ir.cost.memory import activation_bytes, peak_bytes
from planner.ir.cost.price import Cost, price, total
from planner.ir.cost.workload import Workload

__all__ = ["Cost", "Workload", "activation_bytes", "peak_bytes", "price", "total"]
