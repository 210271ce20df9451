"""The exact solver beside a straightforward CP-SAT model, on the LLaVA-1.5-7B problem.

    python benchmarks/solver.py [--seed 0] [--baseline-seconds 30] [--json]

32 layers of 32 heads and 32 MLP groups, every layer optional, eight numbers of image tokens to
choose from, random gamma utilities; one limit (FLOPs) and two (FLOPs and KV bytes). Costs are the
closed forms of a LLaMA decoder layer with multiply-add = 2. Totals of every answer are recomputed
here from those forms; nothing is reported if they disagree.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from planner.solver import solve
from planner.solver.problem import Choice, LayerChoices, Problem, SiteChoices, TokenOption

Ints = npt.NDArray[np.int64]

IMAGE_TOKENS = (576, 432, 288, 192, 144, 96, 64, 32)
TEXT_TOKENS = 64
# CLIP ViT-L/14 at 336 pixels and the two-layer projector, for 577 and 576 tokens; see `outside`.
VISION_LAYERS, VISION_TOKENS, VISION_SIZE = 24, 577, 1024
VOCABULARY = 32_000


@dataclass(frozen=True)
class Decoder:
    """The shape of a LLaMA decoder with as many KV heads as heads."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    mlp: int = 11_008
    groups: int = 32

    def head(self, tokens: int) -> tuple[int, int]:
        """FLOPs and KV bytes (2 an element) of one head: q, k, v, o and the attention products."""
        size = self.hidden // self.heads
        projections = 4 * 2 * self.hidden * size * tokens
        return projections + 4 * tokens * tokens * size, 2 * 2 * size * tokens

    def group(self, tokens: int) -> tuple[int, int]:
        """FLOPs and KV bytes of one MLP group: gate, up and down."""
        return 3 * 2 * self.hidden * (self.mlp // self.groups) * tokens, 0

    def layer(self, tokens: int) -> tuple[int, int]:
        """FLOPs and KV bytes of a layer's two norms and residual additions."""
        return 2 * 7 * tokens * self.hidden + 2 * tokens * self.hidden, 0

    def outside(self) -> tuple[int, int]:
        """FLOPs and KV bytes of vision encoder, projector and lm_head on the last token."""
        size, tokens = VISION_SIZE, VISION_TOKENS
        vision = VISION_LAYERS * (24 * size * size * tokens + 4 * tokens * tokens * size)
        projector = 2 * (size + self.hidden) * self.hidden * (tokens - 1)
        return vision + projector + 2 * self.hidden * VOCABULARY, 0

    def cost(self, tokens: int, layers: int, heads: int, groups: int) -> Ints:
        """Total cost with numbers of layers, heads and groups in all; shape (2,)."""
        parts = (
            (self.head(tokens), heads),
            (self.group(tokens), groups),
            (self.layer(tokens), layers),
        )
        return np.array(self.outside()) + sum(np.array(one) * many for one, many in parts)


SEVEN_B = Decoder()
THIRTEEN_B = Decoder(layers=40, hidden=5120, heads=40, mlp=13_824, groups=108)


def build(
    decoder: Decoder,
    fractions: dict[str, float],
    seed: int = 0,
    image_tokens: tuple[int, ...] = IMAGE_TOKENS,
) -> Problem:
    """A problem with random gamma utilities.

    Args:
        decoder: the model.
        fractions: metric (``flops``, ``kv``) -> its limit as a fraction of the base model.
        seed: of the utilities.
        image_tokens: to choose from; the base model keeps the first of them.
    """
    rng = np.random.default_rng(seed)
    rows = [("flops", "kv").index(metric) for metric in fractions]
    totals = [TEXT_TOKENS + kept for kept in image_tokens]

    def table(cost: npt.ArrayLike, switches: int) -> Ints:
        """Shape (token options, metrics, switches + 1) of what one switch costs."""
        return np.asarray(cost, dtype=np.int64)[:, rows, None] * np.arange(switches + 1)

    head = table([decoder.head(tokens) for tokens in totals], decoder.heads)
    group = table([decoder.group(tokens) for tokens in totals], decoder.groups)
    layer = np.array([decoder.layer(tokens) for tokens in totals], dtype=np.int64)[:, rows]
    layers = tuple(
        LayerChoices(
            name=f"layers.{index}",
            utility=float(rng.gamma(1.0)),
            costs=layer,
            sites=(
                SiteChoices(f"heads.{index}", rng.gamma(1.0, size=decoder.heads), head),
                SiteChoices(f"mlp.{index}", rng.gamma(1.0, size=decoder.groups), group),
            ),
        )
        for index in range(decoder.layers)
    )
    # Diminishing returns: all tokens together are worth a tenth of all switches.
    worth = decoder.layers * (decoder.heads + decoder.groups) / 10
    outside = np.array(decoder.outside(), dtype=np.int64)[rows]
    tokens = tuple(
        TokenOption((kept,), worth * (kept / image_tokens[0]) ** 0.5, outside)
        for kept in image_tokens
    )
    base = decoder.cost(
        totals[0],
        decoder.layers,
        decoder.layers * decoder.heads,
        decoder.layers * decoder.groups,
    )[rows]
    limits = [int(total * part) for total, part in zip(base.tolist(), fractions.values())]
    return Problem(tuple(fractions), np.array(limits, dtype=np.int64), tokens, layers)


@dataclass(frozen=True)
class Answer:
    """What a solver came to."""

    choice: Choice | None
    status: str
    utility: float
    gap: float
    seconds: float


def straightforward(problem: Problem, seconds: float) -> Answer:
    """One Boolean per switch, one per layer and token option, costs conditional on the option.

    Utilities are rounded to a billionth. Switches of a site cost the same: the first one's price.
    """
    begin = time.perf_counter()
    model = cp_model.CpModel()
    option = [model.new_bool_var("") for _ in problem.tokens]
    model.add_exactly_one(option)
    on = [model.new_bool_var("") for _ in problem.layers]
    kept: dict[str, list[cp_model.IntVar]] = {}
    worth = [(token, t.utility) for token, t in zip(option, problem.tokens)]
    for running, layer in zip(on, problem.layers):
        worth.append((running, layer.utility))
        for site in layer.sites:
            kept[site.name] = [model.new_bool_var("") for _ in site.utilities]
            worth += list(zip(kept[site.name], site.utilities.tolist()))
            for switch in kept[site.name]:
                model.add_implication(switch, running)
    for index, chosen in enumerate(option):
        for metric, limit in enumerate(problem.limits.tolist()):
            terms = list(zip(on, (int(layer.costs[index, metric]) for layer in problem.layers)))
            for site in problem.sites:
                price = int(site.costs[index, metric, 1])
                terms += [(switch, price) for switch in kept[site.name]]
            variables, prices = zip(*terms)
            room = limit - int(problem.tokens[index].costs[metric])
            total = cp_model.LinearExpr.weighted_sum(variables, prices)
            model.add(total <= room).only_enforce_if(chosen)
    variables, utilities = zip(*worth)
    model.maximize(cp_model.LinearExpr.weighted_sum(variables, [round(u * 1e9) for u in utilities]))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 2
    solver.parameters.max_time_in_seconds = seconds
    status = solver.solve(model)
    spent = time.perf_counter() - begin
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(None, solver.status_name(status).lower(), 0.0, float("inf"), spent)
    choice = Choice(
        next(index for index, chosen in enumerate(option) if solver.boolean_value(chosen)),
        tuple(solver.boolean_value(running) for running in on),
        {
            name: tuple(i for i, switch in enumerate(switches) if solver.boolean_value(switch))
            for name, switches in kept.items()
        },
    )
    utility = problem.utility(choice)
    gap = max(solver.best_objective_bound / 1e9 - utility, 0.0) / utility
    return Answer(choice, solver.status_name(status).lower(), utility, gap, spent)


def proven(problem: Problem) -> Answer:
    """This project's solver."""
    solution = solve(problem)
    return Answer(
        solution.choice, solution.status, solution.utility, solution.gap, solution.seconds
    )


def check(decoder: Decoder, problem: Problem, answer: Answer) -> None:
    """Recompute an answer's totals from the closed forms.

    Raises:
        SystemExit: if they disagree with the problem's, or break a limit.
    """
    if answer.choice is None:
        return
    counts = {name: len(switches) for name, switches in answer.choice.kept.items()}
    cost = decoder.cost(
        TEXT_TOKENS + problem.tokens[answer.choice.token_option].keep[0],
        sum(answer.choice.layers_on),
        sum(count for name, count in counts.items() if name.startswith("heads.")),
        sum(count for name, count in counts.items() if name.startswith("mlp.")),
    )[[("flops", "kv").index(metric) for metric in problem.metrics]]
    if (cost != problem.cost(answer.choice)).any():
        raise SystemExit(f"recomputed cost {cost} is not {problem.cost(answer.choice)}")
    if (cost > problem.limits).any() or not problem.is_feasible(answer.choice):
        raise SystemExit(f"the answer costs {cost}, over the limits {problem.limits}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the utilities")
    parser.add_argument("--baseline-seconds", type=float, default=30.0)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args()
    cases = {
        "7B, FLOPs 0.65": (SEVEN_B, {"flops": 0.65}),
        "7B, FLOPs 0.65 and KV 0.5": (SEVEN_B, {"flops": 0.65, "kv": 0.5}),
    }
    rows = []
    for name, (decoder, fractions) in cases.items():
        problem = build(decoder, fractions, arguments.seed)
        answers = {
            "planner": proven(problem),
            "CP-SAT": straightforward(problem, arguments.baseline_seconds),
        }
        for solver, answer in answers.items():
            check(decoder, problem, answer)
            shown = {key: getattr(answer, key) for key in ("status", "utility", "gap", "seconds")}
            rows.append({"problem": name, "switches": problem.switches, "solver": solver, **shown})
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'problem':28}{'solver':10}{'status':10}{'utility':>12}{'gap':>10}{'seconds':>9}")
    for row in rows:
        print(
            f"{row['problem']:28}{row['solver']:10}{row['status']:10}"
            f"{row['utility']:12.4f}{row['gap']:10.1e}{row['seconds']:9.2f}"
        )


if __name__ == "__main__":
    main()
