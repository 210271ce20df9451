"""Plans from Python: one model under several budgets, then under several limits at once.

    python examples/plan_from_python.py --model llava-7b --budgets 0.5 0.65 0.8 -o build/plans

Prints what each plan keeps and costs, and saves the plans.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from planner.files import output_folder
from planner.plan import Plan, load_plan, save_plan
from planner.planning.compiler import compile_plan
from planner.planning.request import Request


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llava-7b", help="alias, local folder or hub id")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.5, 0.65, 0.8], help="fractions of the FLOPs"
    )
    parser.add_argument(
        "--limits",
        nargs="+",
        default=["flops=0.7", "kv=0.5", "latency=0.75"],
        help="limits that one more plan must respect together: metric=fraction or metric=amount",
    )
    parser.add_argument("--device", default="a100-40g", help="for seconds: see `planner devices`")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/plans"), help="folder")
    return parser.parse_args()


def row(label: str, plan: Plan) -> str:
    cost = plan.cost
    tokens = plan.tokens[-1].keep if plan.tokens else plan.provenance["image_tokens"]
    return (
        f"{label:<34} {cost['flops']['plan'] / 1e12:>8.3f} {cost['latency']['plan'] * 1e3:>8.3f} "
        f"{cost['kv']['plan'] / 2**20:>8.1f} {plan.layers - len(plan.layers_off):>7} {tokens:>7} "
        f"{plan.solver['utility']:>8.4f}  {plan.solver['status']}"
    )


def main() -> None:
    options = arguments()
    folder = output_folder(options.output)
    budgets: dict[str, float | list[str]] = {f"flops-{b:g}": b for b in options.budgets}
    budgets["several-limits"] = options.limits
    print(f"{options.model} on {options.device}")
    print(
        f"{'plan':<34} {'TFLOP':>8} {'ms':>8} {'KV MiB':>8} {'layers':>7} {'tokens':>7} "
        f"{'utility':>8}  proof"
    )
    for name, budget in budgets.items():
        # The graph is lowered once; every later call finds it in the cache.
        compiled = compile_plan(Request(options.model, budget=budget, device=options.device))
        path = folder / f"{name}.yaml"
        save_plan(compiled.plan, path)
        assert load_plan(path) == compiled.plan
        print(row(name if isinstance(budget, float) else " ".join(budget), compiled.plan))
    print(f"saved in {folder}")


if __name__ == "__main__":
    main()
