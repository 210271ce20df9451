"""What operators and whole passes take on this machine: the device file of `planner calibrate`.

In: this machine. Out: a `planner.ir.cost.measured_device.MeasuredDevice`. Imports `planner.ir`,
`planner.kernels` and `planner.models.running`.

    device_profile   all of it, for one precision; passes of one model
    operator_cases   operators as models run them, at sizes that plans produce
    sweep            cases timed round by round, and tables of them
    subjects         models whose passes are timed, under random plans on random prompts
    whole_passes     what whole passes take besides their operators, fitted to random ones
    pace             work timed beside a product that tells how fast the machine is just now
    stopwatch        seconds on a CPU and on a CUDA device
"""

from planner.models.profiling.device_profile import machine_of, profile, profile_model

__all__ = ["machine_of", "profile", "profile_model"]
