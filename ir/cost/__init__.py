"""What an operator costs: FLOPs, bytes moved, seconds, KV bytes, parameters.

Enters: a Graph, a `Workload` and (for seconds) a device. Leaves: a `Cost` per operator. The three
models share one interface: exact FLOPs (`flops`), a roofline per device (`roofline`) and the named
conventions of published tables (`conventions`).
"""

from planner.ir.cost.price import Cost, Step, price, total
from planner.ir.cost.workload import Workload

__all__ = ["Cost", "Step", "Workload", "price", "total"]
