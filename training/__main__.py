"""Train by a configuration: what torchrun and accelerate start in every process.

accelerate launch --num_processes 2 -m planner.training training/configs/adallava-l.yaml
torchrun --nproc-per-node 8 -m planner.training training/configs/adallava-l-llava-7b.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from planner.ir.errors import PlannerError
from planner.training.recipes import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m planner.training", description="Train.")
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        recipe, config = load_recipe(options.config, options.set)
        recipe.train(config)
    except PlannerError as error:
        print(f"planner: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
