"""A compiled model under several budgets: compiled once, every budget is data.

    python examples/torch_compile.py --model tiny-llava --budgets 1 0.8 0.6

Asks one question about a picture under each budget. Prints the answer, what of the model ran, and
how many graphs were compiled for it: none after the first budget.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image, ImageDraw
from torch._dynamo.utils import counters

import planner
from planner.loading import load_model, prompt_inputs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-llava", help="alias, local folder or hub id")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 0.8, 0.6])
    parser.add_argument("--prompt", default="how many red circles are there ?")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--inner", default="inductor", help="eager compiles faster, runs slower")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    model, processor, _ = load_model(options.model)
    picture = Image.new("RGB", (56, 56), "white")
    ImageDraw.Draw(picture).ellipse((12, 12, 40, 40), fill="red")
    inputs = prompt_inputs(model, processor, options.prompt, picture)
    model.compile(backend="planner", options={"budget": 1.0, "inner": options.inner})
    for budget in options.budgets:
        before = counters["stats"]["unique_graphs"]
        planner.budget(model, budget)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=options.new_tokens, do_sample=False)
        # Plans are known once the model has been called.
        plan = planner.plan_of(model)
        answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], True)
        graphs = counters["stats"]["unique_graphs"] - before
        print(
            f"budget {budget:g}: {answer.strip()!r}, {plan.cost['flops']['fraction']:.3f} of the "
            f"FLOPs, {plan.layers - len(plan.layers_off)} of {plan.layers} layers, "
            f"{graphs} graphs compiled"
        )


if __name__ == "__main__":
    main()
