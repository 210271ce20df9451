"""Train by a configuration: what torchrun and accelerate start in every process.

torchrun --nproc-per-node 8 -m planner.training training/configs/adallava-l-llava-7b.yaml
accelerate launch --multi_gpu --num_processes 2 -m planner.training training/configs/adallava-l.yaml

Both work on CPUs too, where processes talk by gloo.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from planner.ir.errors import InputError, PlannerError
from planner.training.requirements import require_extras

# What launchers, torchrun and four kinds of MPI among them, tell a process of a group.
_RANKS = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise InputError where this process trains alone, and several were asked for.

    ``accelerate launch --cpu --num_processes 2`` says where processes should meet and then starts
    one (accelerate 1.15, `simple_launcher`), which would train on half of the batch.
    """
    alone = not any(name in environment for name in _RANKS)
    if alone and "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment:
        raise InputError(
            "accelerate launch started one process of several, as it does with --cpu; use "
            "torchrun --nproc-per-node N -m planner.training, or accelerate launch --multi_gpu "
            "--num_processes N, which run on CPUs as well"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m planner.training", description="Train.")
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        check_launch(os.environ)
        require_extras()
        # Slow to import, and not needed to refuse.
        from torch import distributed

        from planner.training.recipes import load_recipe

        train, config = load_recipe(options.config, options.set)
        train(config)
    except PlannerError as error:
        print(f"planner: {error}", file=sys.stderr)
        return 2
    # Left to the interpreter's end, a group's threads may outlive what they use and abort a process
    # that has done its work. Not after an error, where others may still wait for this one.
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
