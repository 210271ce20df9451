"""Fuzzing: ``make fuzz``, or ``python tests/fuzz/fuzzing.py --target plans --cases 100000``.

Every input is taken, or refused with one sentence (an InputError), within two seconds. An input
that is neither is made as small as it can be and printed, and kept in ``.hypothesis``, from where
the next run tries it first.
"""

import argparse
import sys
import time

from hypothesis import HealthCheck, Phase, given, seed, settings
from targets import TARGETS

from planner.ir.errors import InputError

__all__ = ["fuzz"]

_SECONDS = 2.0
_BATCH = 2_000


def judge(take, value):
    """Whether an input was taken; AssertionError where it was neither taken nor refused."""
    started = time.perf_counter()
    taken = _taken(take, value)
    if time.perf_counter() - started > _SECONDS:
        # Others may have had the processor; asking for its time takes as long as many inputs.
        started = time.process_time()
        _taken(take, value)
        assert time.process_time() - started < _SECONDS, "it took too long"
    return taken


def _taken(take, value):
    try:
        take(value)
    except InputError:
        return False
    return True


def fuzz(name, cases, number=None):
    """Try so many inputs on a target; how many were taken.

    Args:
        name: of the target.
        cases: inputs.
        number: of another sequence of inputs; None for the same every time.
    """
    target, taken = TARGETS[name], 0

    @settings(
        max_examples=cases, deadline=None, database=None if number is None else settings().database,
        derandomize=number is None, suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(target.inputs())
    def run(value):
        nonlocal taken
        taken += judge(target.take, value)

    if number is not None:
        run = seed(number)(run)
    run()
    return taken


def main(arguments):
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="repeatable")
    parser.add_argument("--cases", type=int, default=5000, help="of each target")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(arguments)
    for name in options.target or TARGETS:
        started, done, taken = time.perf_counter(), 0, 0
        while done < options.cases:
            # In parts: hypothesis remembers every input of a run.
            some = min(_BATCH, options.cases - done)
            taken += fuzz(name, some, options.seed + done)
            done += some
            seconds = time.perf_counter() - started
            print(f"{name}: {done} cases, {taken} taken, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
