"""What utilities, recovery and healing are worth on a real language model, SmolLM2-135M-Instruct.

    planner experiment smollm2 --work build/experiments -o docs/results

Weights and texts come out of packages (`planner.training.data.packaged`), and
`planner[smollm2]` has what reads them. Every cell is kept as soon as it is measured, so a run that
was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planner.cpu import cpu_name
from planner.files import write_text
from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.models.calibration import calibrate
from planner.models.calibration.measurement import TOKEN_LAYER
from planner.models.calibration.pair_losses import measure_pairs
from planner.models.calibration.text import PASSAGE_TOKENS, passages, text_samples
from planner.models.recovery import (
    Chain,
    Moments,
    chain_of,
    refitted,
    replaced,
    site_moments,
)
from planner.models.recovery.healing import Healing, heal
from planner.models.recovery.moments import GRADED, faster_products, narrowable
from planner.models.recovery.trials import TRIALS, tried_worth
from planner.models.running.bindings import BoundSite, bind
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.program import Program
from planner.plan import Plan, load_plan, save_plan
from planner.planning.compiler import plan_graph
from planner.planning.request import Request
from planner.planning.switches import with_switches
from planner.planning.utilities import Utilities, load_utilities, save_utilities
from planner.progress import Say
from planner.solver import Infeasible
from planner.training.data.packaged import TEXTS, WEIGHTS, smollm2
from planner.training.experiments.layer_regret import layer_regret

BUDGETS = (0.9, 0.8, 0.65)
JOINT = "layers,heads,mlp"
# Other passages of these texts are tested on; all others are never calibrated on.
CALIBRATED_ON = ("news", "documentation")
# Utilities, axes and budget of what is healed: that takes minutes a plan, and comes last.
HEALED = (("chain", JOINT, 0.8),)
HEALING = Healing(steps=100, rank=0)
# Rows that are measured in float32 as well.
PRECISE = (("chain", JOINT, "refit"),)
# Of which utilities sets of layers are tried.
RANKED = ("first-order", "leave-one-out", "pairs")
# Rows of the table: utilities, axes, recovery. Chains count on refit.
ROWS = (
    ("prior", JOINT, ""),
    ("chain", JOINT, "refit"),
    ("first-order", JOINT, ""),
    ("first-order", JOINT, "refit"),
    ("chain", "mlp", "refit"),
    *(("first-order", axes, "") for axes in ("mlp", "layers", "heads")),
    ("leave-one-out", JOINT, ""),
    ("leave-one-out", "layers", ""),
    ("leave-one-out", JOINT, "refit"),
    ("pairs", JOINT, ""),
    ("pairs", "layers", ""),
    ("pairs", JOINT, "refit"),
)
# Passages of 192 tokens: for statistics and healing, first-order, leave-one-out with pairs; and, of
# each text, for tests. Few are the first of so many that are spread over the texts.
CALIBRATED, FIRST_ORDER, LEFT_OUT, TESTED, SPREAD = 640, 8, 2, 12, 96
CLOZE_ITEMS, CLOZE_CONTEXT, CLOZE_CHOICES = 32, 32, 4


class _Bench:
    """The model, its texts, its utilities, and the cells that were measured."""

    def __init__(self, work: Path, progress: Say) -> None:
        self.work = work / "smollm2"
        self.work.mkdir(parents=True, exist_ok=True)
        self.progress = progress

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.progress("weights: from the package index, as float32")
        folder = smollm2(self.work)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder)

    @property
    def model(self) -> Any:
        """In float32."""
        return self.loaded[0]

    @cached_property
    def graph(self) -> Graph:
        """With switches."""
        return with_switches(lower_model(self.model, "smollm2"))

    @cached_property
    def texts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> passages to calibrate on, none of a text that is for tests alone; for tests."""
        found = {}
        for name, text in TEXTS.items():
            whole = passages(self.loaded[1], text.read(self.work), 10**6)
            is_test = torch.arange(len(whole)) % 8 == 0
            others = whole[~is_test] if name in CALIBRATED_ON else whole[:0]
            found[name] = others, _spread(whole[is_test], TESTED)
        return found

    def samples(self, count: int) -> list[Any]:
        """Calibration samples, texts in turn."""
        each = max(count, SPREAD) // len(CALIBRATED_ON)
        turns = zip(*(_spread(self.texts[name][0], each) for name in CALIBRATED_ON), strict=True)
        return text_samples(torch.stack([row for turn in turns for row in turn])[:count])

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Of all sites, from the calibration passages."""
        path = self.work / "moments.pt"
        if not path.is_file():
            self.progress(f"moments of {CALIBRATED} passages")
            found = site_moments(self.model, self.layers, self.samples(CALIBRATED))
            torch.save({name: vars(moments) for name, moments in found.items()}, path)
        known = torch.load(path, weights_only=True)
        return {name: Moments(**moments) for name, moments in known.items()}

    @cached_property
    def chains(self) -> dict[str, Chain]:
        """The removal chain of every site."""
        path = self.work / "chains.pt"
        if not path.is_file():
            self.progress("removal chains")
            found = {
                site.site.name: chain_of(site, self.moments[site.site.name])
                for site in narrowable(self.layers)
            }
            torch.save({name: (c.order, c.costs.tolist()) for name, c in found.items()}, path)
        known = torch.load(path, weights_only=True)
        return {name: Chain(order, np.array(costs)) for name, (order, costs) in known.items()}

    def chain(self, site: BoundSite) -> Chain:
        """Of one site."""
        return self.chains[site.site.name]

    @cached_property
    def layers(self) -> Any:
        """The decoder's, bound."""
        return bind(self.model, self.graph)

    def utilities(self, name: str) -> str:
        """What a request says for utilities of a name; measured once."""
        path = self.work / f"{name}.npz"
        if name == "prior" or path.is_file():
            return name if name == "prior" else str(path)
        self.progress(f"utilities: {name}")
        save_utilities(path, self._measured(name), self.graph)
        return str(path)

    def _measured(self, name: str) -> Utilities:
        if name == "chain":
            some = self.samples(CALIBRATED)
            worth = tried_worth(self.model, self.graph, self.layers, self.moments, self.chain, some)
            return Utilities(name, worth, 0.0, recover="refit")
        if name == "first-order":
            some = self.samples(FIRST_ORDER)
            return calibrate(self.model, self.graph, some, method="taylor").utilities(name)
        some, partial = self.samples(LEFT_OUT), self.work / f"{name}.partial"
        with faster_products(self.model):
            if name == "leave-one-out":
                return calibrate(self.model, self.graph, some, partial=partial).utilities(name)
            alone = load_utilities(Path(self.utilities("leave-one-out")), self.graph)
            together = measure_pairs(
                self.model, self.graph, some, alone.sites, TOKEN_LAYER, partial=partial
            )
            return replace(alone, name=name, pairs=together.sites)

    def plan(self, utilities: str, axes: str, budget: float) -> Plan | None:
        """The plan; None where the axes cannot meet the budget."""
        path = self.work / f"{utilities}_{axes}_{budget}.yaml"
        if path.is_file():
            return load_plan(path)
        request = Request("smollm2", budget, axes, utilities=self.utilities(utilities))
        try:
            compiled = plan_graph(self.graph, request)
        except Infeasible:
            return None
        save_plan(compiled.plan, path)
        return compiled.plan

    def weights(self, plan: Plan, recovery: str) -> Mapping[str, Tensor]:
        """Weights for a plan."""
        if not recovery:
            return {}
        weights = refitted(Program.build([plan], self.graph, self.layers), self.moments, self.chain)
        if recovery == "refit":
            return weights

        def shown(step: int, loss: float) -> None:
            self.progress(f"healing, step {step} of {HEALING.steps}: {loss:.3f} nats")

        some = self.samples(CALIBRATED)
        return heal(self.model, self.graph, plan, weights, some, HEALING, shown).weights

    def measured(
        self, plan: Plan | None, weights: Mapping[str, Tensor], precise: bool
    ) -> dict[str, float]:
        """Perplexity by text and accuracy of the cloze task, under a plan or of the base model."""
        gates = Gates() if plan is None else Gates.of([plan], self.graph)
        masked = MaskedExecutor(self.model, self.graph)
        with (
            torch.no_grad(),
            replaced(self.model, weights),
            masked.using(gates),
            nullcontext() if precise else faster_products(self.model),
        ):
            found = {name: _perplexity(self.model, ids) for name, (_, ids) in self.texts.items()}
            return found | {"cloze": _cloze(self.model, self.loaded[1], self.texts)}

    def cell(
        self, utilities: str, axes: str, budget: float, recovery: str, precise: bool = False
    ) -> dict[str, Any]:
        """One row of the table at a budget, from its file or measured now; precise is float32."""
        name = "_".join((utilities, axes, str(budget), recovery or "none"))
        name += "_float32" if precise else ""

        def measure() -> dict[str, Any]:
            plan = self.plan(utilities, axes, budget) if utilities else None
            result: dict[str, Any] = {}
            if plan is not None or not utilities:
                weights = {} if plan is None else self.weights(plan, recovery)
                result = self.measured(plan, weights, precise)
            return {
                "utilities": utilities,
                "axes": axes,
                "budget": budget,
                "recovery": recovery,
                "precise": precise,
                "result": result,
            }

        return self.kept(name, measure)

    def layers_off(self, budget: float) -> dict[str, Any]:
        """How well utilities tell which layers may go at a budget, on a test passage a text."""

        def measure() -> dict[str, Any]:
            known = {
                name: load_utilities(Path(self.utilities(name)), self.graph) for name in RANKED
            }
            plans = [self.plan(name, "layers", budget) for name in RANKED]
            off = [plan.layers_off for plan in plans if plan is not None]
            judged = text_samples(torch.stack([self.texts[name][1][0] for name in CALIBRATED_ON]))
            with faster_products(self.model):
                found = layer_regret(self.model, self.graph, judged, known, off)
            return {"budget": budget, "off": len(off[0]), **found}

        return self.kept(f"layers-off_{budget}", measure)

    def kept(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under a name, now or before."""
        path = self.work / "cells" / f"{name}.json"
        if not path.is_file():
            self.progress(name)
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps(measure(), indent=1) + "\n")
        return dict(json.loads(path.read_text()))


def _spread(rows: Tensor, count: int) -> Tensor:
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


def _perplexity(model: Any, ids: Tensor) -> float:
    """Of passages, one at a time; their first token is given."""
    total = 0.0
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[1:]))
    return float(torch.tensor(total / len(ids)).exp())


def _cloze(model: Any, tokenizer: Any, texts: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Share of items in which the token that follows is likelier than three that follow elsewhere.

    Only tokens that begin a word of four letters or more are asked for.
    """
    ids = torch.cat([texts[name][1] for name in CALIBRATED_ON])
    words = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    is_word = torch.tensor([len(w) > 4 and w[0] == " " and w[1:].isalpha() for w in words])
    places = [(r, c) for r, c in product(range(len(ids)), range(CLOZE_CONTEXT, ids.shape[1]))]
    places = [(r, c) for r, c in places if is_word[ids[r, c]]]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(places), generator=generator).tolist()
    answers = [int(ids[places[n]]) for n in chosen]
    right = 0
    for item in range(CLOZE_ITEMS):
        row, column = places[chosen[item]]
        context = ids[row, column - CLOZE_CONTEXT : column]
        others = [a for a in answers[CLOZE_ITEMS + item :: CLOZE_ITEMS] if a != answers[item]]
        choices = [answers[item], *others[: CLOZE_CHOICES - 1]]
        logits = model(input_ids=context[None], use_cache=False).logits[0, -1]
        right += int(logits[choices].argmax() == 0)
    return right / CLOZE_ITEMS


def run_smollm2(work: Path, progress: Say) -> Iterator[dict[str, Any]]:
    """Measure what is missing of the table, and give back what there is of it after every row."""
    bench = _Bench(work, progress)
    cells = [bench.cell("", "", 1.0, "")]
    results: dict[str, Any] = {
        "experiment": "smollm2",
        "title": "SmolLM2-135M-Instruct under budgets",
        "machine": f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "rows": cells,
    }
    for utilities, axes, recovery in ROWS:
        cells += [bench.cell(utilities, axes, budget, recovery) for budget in BUDGETS]
        yield results
    results["layers_off"] = [bench.layers_off(budget) for budget in BUDGETS]
    yield results
    for utilities, axes, budget in HEALED:
        cells.append(bench.cell(utilities, axes, budget, "refit and heal"))
        yield results
    cells.append(bench.cell("", "", 1.0, "", precise=True))
    for utilities, axes, recovery in PRECISE:
        cells += [bench.cell(utilities, axes, budget, recovery, True) for budget in BUDGETS]
        yield results


def smollm2_page(results: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    bases = {row["precise"]: row["result"] for row in results["rows"] if not row["utilities"]}
    base, tested = bases[False], [name for name in TEXTS if name not in CALIBRATED_ON]
    sources = "; ".join(f"*{name}*, {text.source}" for name, text in TEXTS.items())
    lines = [
        f"# {results['title']}",
        "",
        f"Perplexity over the base model's at {', '.join(map(str, BUDGETS))} of FLOPs, and "
        f"accuracy of a cloze task of {CLOZE_ITEMS} items with {CLOZE_CHOICES} choices, made from "
        f"what is tested of {' and '.join(CALIBRATED_ON)}. Texts: "
        f"{sources}. Of each, {TESTED} passages of {PASSAGE_TOKENS} tokens are tested on. "
        f"Calibrated on are other passages of {' and '.join(CALIBRATED_ON)}, and nothing of "
        f"{' and '.join(tested)}: {CALIBRATED} for refit, chains ({GRADED} of them for gradients, "
        f"{TRIALS} for trials) and {HEALING.steps} steps of healing all weights, {FIRST_ORDER} for "
        f"first-order, {LEFT_OUT} for leave-one-out and pairs. Products are in bfloat16 where the "
        f"CPU multiplies tiles of it, but for rows marked float32. Weights: {WEIGHTS.requirement}. "
        f"Seed 0. Machine: {results['machine']}.",
        "",
        "Base model: perplexity "
        + ", ".join(f"{base[name]:.1f} ({name})" for name in TEXTS)
        + f", cloze {base['cloze']:.2f}.",
        "",
        f"| utilities | axes | recovery | {' | '.join(TEXTS)} | cloze |",
        "|---" * (len(TEXTS) + 4) + "|",
    ]
    groups: dict[tuple[str, str, str, bool], dict[float, dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["utilities"]:
            key = (row["utilities"], row["axes"], row["recovery"], row["precise"])
            groups.setdefault(key, {})[row["budget"]] = row["result"]
    for (utilities, axes, recovery, precise), by_budget in groups.items():
        found = [by_budget.get(budget) for budget in BUDGETS]
        cells = [
            " / ".join(f"{r[text] / bases[precise][text]:.3g}" if r else "-" for r in found)
            for text in TEXTS
        ]
        cells.append(" / ".join(f"{r['cloze']:.2f}" if r else "-" for r in found))
        how = (recovery or "none") + (", float32" if precise else "")
        joint = "joint" if "," in axes else axes
        lines.append(f"| {utilities} | {joint} | {how} | {' | '.join(cells)} |")
    if "layers_off" in results:
        lines += ["", *_layers_off_lines(results["layers_off"])]
    return "\n".join([*lines, "", "    planner experiment smollm2 -o docs/results", ""])


def _layers_off_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Which layers may go",
        "",
        "Sets of layers, those of the plans and others, by the KL divergence (nats a token) of a "
        f"test passage of {' and '.join(CALIBRATED_ON)} each: the rank correlation (Spearman) of "
        "what utilities predict, and what the set that they predict to lose least loses over the "
        "best that was tried.",
        "",
        "| FLOPs | layers off | sets | utilities | rank | loss | regret |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, found in row["utilities"].items():
            lines.append(
                f"| {row['budget']} | {row['off']} | {row['sets']} | {name} | "
                f"{found['rank']:.2f} | {found['loss']:.3f} | {found['regret']:.3f} |"
            )
    return lines
