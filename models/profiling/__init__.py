"""What operators and whole passes take on this machine: the device file of `planner calibrate`.

In: this machine. Out: a `planner.ir.cost.measured_device.MeasuredDevice`. Imports `planner.ir`,
`planner.kernels` and `planner.models.running`.

    device_profile   all of it, for one precision
    operator_cases   operators as models run them, at sizes that plans produce
    sweep            cases timed round by round, and tables of them
    whole_passes     passes of small models under random plans, and what they take besides
    stopwatch        seconds on a CPU and on a CUDA device
"""

from planner.models.profiling.device_profile import profile

__all__ = ["profile"]
