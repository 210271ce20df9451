"""One architecture: lowered at its default size, and run at a small one under a plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.graph_text import parse_graph, print_graph
from planner.ir.lowering import lower_config, lower_model
from planner.ir.lowering.attempts import first_success, quiet, sentence
from planner.ir.lowering.counted_flops import CountedFlops
from planner.ir.verify import verify
from planner.models.checking.small_config import default, small_default
from planner.models.checking.small_prompt import Prompts, prompts_of
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.planning import Planning
from planner.models.running.skipping import obeying, session_for
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.plan_costs import PlanCosts
from planner.planning.request import Request

# What is checked, in order, and what it means.
CHECKS = {
    "lowered": "the default config is lowered, its Graph verifies and reads back (*small*: the "
    "small config is; the default one is not, see the remark)",
    "runs": "the small model runs under a plan for 60 % of its FLOPs, or for more where the remark "
    "says so",
    "exact": "it computes what the same plan computes by masks, and the dense plan what stock does",
    "flops": "the FLOPs of stock and of the plan are those that they are priced at, and within the "
    "budget",
    "cached": "generating with a KV cache gives the logits of generating without one",
    "batch": "rows of a padded batch get the logits that they get alone",
}
# Tried in turn, with what they are of: small images weigh more than few words, and the products of
# some layers are in what cannot be left out.
_BUDGETS = ((0.6, "model"), (0.6, "llm"), (0.8, "llm"), (0.9, "llm"))
_LENGTHS = (12, 8)
_NEW_TOKENS = 3
# Relative error of float32 logits that summing in another order explains.
_TOLERANCE = 1e-4
_YES, _NO, _SMALL = "yes", "no", "small"


@dataclass
class Checked:
    """A row of the table."""

    model_type: str  # as transformers maps it
    # Check -> ``yes``, ``no``, ``small`` (see `CHECKS`), or ``stock``: the stock model does not do
    # it either. Empty for what could not be tried.
    answers: dict[str, str] = field(default_factory=dict)
    # Kind of site -> how many the Graph has, of the small model where the default config is not
    # lowered.
    sites: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)  # reasons, one sentence each


def lowered_row(model_type: str) -> Checked:
    """Lower one architecture's default config.

    `model_type`: that transformers maps to a config, and that to a model.
    """
    row = Checked(model_type)
    for size, make in ((_YES, default), (_SMALL, small_default)):
        try:
            with quiet():
                config = make(model_type)
            lowered = lower_config(config, model_type)
            verify(lowered.graph)
            text = print_graph(lowered.graph)
            if print_graph(parse_graph(text)) != text:
                raise InputError("its text form does not read back")
        except Exception as error:
            row.answers["lowered"] = _NO
            row.remarks.append(_reason(error))
            continue
        row.answers["lowered"] = size
        row.sites = _sites(lowered.graph)
        row.remarks += lowered.notes
        break
    return row


def run_row(model_type: str) -> Checked:
    """Run a small model of one architecture, and see whether it is right.

    `model_type`: that transformers maps to a config, and that to a model.
    """
    row = Checked(model_type)
    trial = _Trial(row)
    with quiet():
        try:
            for step in (trial.build, trial.plan, trial.run, trial.count, trial.cache, trial.batch):
                step()
        except Exception as error:
            row.remarks.append(f"small: {_reason(error)}")
    return row


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if isinstance(error, InputError) and lines else sentence(error)


def _sites(graph: Graph) -> dict[str, int]:
    kinds = ("layer", "heads", "mlp")
    return {kind: sum(1 for _ in graph.sites_of(kind)) for kind in kinds}


class _Trial:
    """A small model and what is found out about it."""

    def __init__(self, row: Checked) -> None:
        self.row = row
        self.model: Any = None
        self.graph: Any = None
        self.made: Any = None
        self.load: Any = None
        self.budget = 0.0
        # FLOPs that the budget is not of.
        self.beside = 0
        self.prompts = Prompts()

    def build(self) -> None:
        """Make the model and its Graph."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        config = small_default(self.row.model_type)
        sees = type(config) in AutoModelForImageTextToText._model_mapping
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        torch.manual_seed(0)
        model = auto.from_config(config)
        self.model = randomised(model.float().eval())
        self.graph = lower_model(self.model, self.row.model_type)
        self.prompts = prompts_of(self.model)
        if sees and not self.prompts.pixels:
            self.row.remarks.append("small: runs on words alone")

    def plan(self) -> None:
        """Make a plan for a prompt."""
        with session_for(self.model, self.graph) as session:
            self.load = session.implementation.prompt_of(self._prompt_for_last())
        request = Request(self.row.model_type, new_tokens=0, switches="layers,heads,mlp")

        def made(budget: float, scope: str) -> tuple[Plan, float, bool]:
            planning = Planning(self.graph, replace(request, scope=scope))
            return planning.plan_on(Budget.of(budget), self.load), budget, scope == "llm"

        found, failure = first_success(partial(made, *which) for which in _BUDGETS)
        if found is None:
            assert failure is not None
            raise failure
        self.made, self.budget, is_of_language = found
        if is_of_language:
            self.row.remarks.append(f"small: {self.budget} is of the language model")
            self.beside = self.load.encoder_flops or 0

    @torch.no_grad()
    def run(self) -> None:
        """Run it, beside the same plan by masks."""
        prompt = self.prompts.of(_LENGTHS[0])
        answers = self.row.answers
        answers["runs"] = answers["exact"] = _NO
        stock = self.model(**prompt).logits
        with obeying(self.model, self.graph, self.made):
            planned = self.model(**prompt).logits
        answers["runs"] = _YES
        dense = Plan(self.made.model, self.made.fingerprint, self.made.layers)
        with obeying(self.model, self.graph, dense):
            same = torch.equal(self.model(**prompt).logits, stock)
        with MaskedExecutor(self.model, self.graph).using(Gates.of([self.made], self.graph)):
            masked = self.model(**prompt).logits
        error = _error(planned, masked)
        if same and error <= _TOLERANCE and not torch.equal(planned, stock):
            answers["exact"] = _YES
        elif not same:
            self.row.remarks.append("small: the dense plan is not the stock model")
        else:
            self.row.remarks.append(f"small: the plan is {error:.1g} off the plan by masks")

    @torch.no_grad()
    def count(self) -> None:
        """Count its FLOPs."""
        self.row.answers["flops"] = _NO
        prompt = self._prompt_for_last()
        cost = PlanCosts(self.graph, self.load, "model").of(self.made)["flops"]
        priced = [cost["base"], cost["plan"]]
        counted = [self._flops(prompt)]
        with obeying(self.model, self.graph, self.made):
            counted.append(self._flops(prompt))
        base, planned = (count - self.beside for count in counted)
        exceeds = planned > self.budget * base
        if counted == priced and not exceeds:
            self.row.answers["flops"] = _YES
        if counted != priced:
            ratios = ", ".join(f"{c / p:.3f}" for c, p in zip(counted, priced, strict=True))
            self.row.remarks.append(f"small: runs {ratios} of the FLOPs priced, stock and planned")
        if exceeds:
            said = f"small: the plan for {self.budget} runs {planned / base:.3f} of the FLOPs"
            self.row.remarks.append(said)

    def _prompt_for_last(self) -> dict[str, Any]:
        """A prompt, as generation reads it: it wants the logits of the last token alone."""
        known: Any = inspect.signature(self.model.forward).parameters
        last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        return {**self.prompts.of(_LENGTHS[0]), **last}

    def _flops(self, prompt: dict[str, Any]) -> int:
        with CountedFlops() as counter:
            self.model(**prompt)
        total: int = counter.total
        return total

    def cache(self) -> None:
        """Generate with a cache and without one."""
        prompt = self.prompts.of(_LENGTHS[0])
        self._same(
            "cached",
            lambda: (
                self._generate(prompt, use_cache=True),
                self._generate(prompt, use_cache=False),
            ),
        )

    def batch(self) -> None:
        """Generate in a batch and alone."""

        def both() -> tuple[Tensor, Tensor]:
            together = self._generate(self.prompts.of(*_LENGTHS))
            alone = [self._generate(self.prompts.of(length)) for length in _LENGTHS]
            return together, torch.cat(alone, 1)

        self._same("batch", both)

    def _same(self, check: str, run: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Compare two runs under the plan; where they differ, the same two of the stock model."""
        self.row.answers[check] = _NO
        why = ""
        try:
            with obeying(self.model, self.graph, self.made):
                error = _error(*run())
            why = f"the logits are {error:.1g} off"
        except Exception as raised:
            error, why = float("inf"), _reason(raised)
        if error <= _TOLERANCE:
            self.row.answers[check] = _YES
            return
        try:
            differs = not _error(*run()) <= _TOLERANCE
        except Exception:
            differs = True
        if differs:
            self.row.answers[check] = "stock"
        else:
            self.row.remarks.append(f"small, {check}: {why}")

    @torch.no_grad()
    def _generate(self, prompt: dict[str, Tensor], **options: Any) -> Tensor:
        """Logits, shape (steps, batch, vocabulary), on a course that no rounding changes."""
        out = self.model.generate(
            **prompt,
            **options,
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(out.logits)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Relative, of the logits that are not ruled out; what is must be in both."""
    lowest = torch.finfo(expected.dtype).min / 2
    if actual.shape != expected.shape or not torch.equal(actual <= lowest, expected <= lowest):
        return float("inf")
    actual, expected = actual[expected > lowest], expected[expected > lowest]
    if not torch.isfinite(expected).all():
        return float("inf")
    return float((actual - expected).norm() / expected.norm())


def randomised(model: nn.Module) -> nn.Module:
    """Draw weights at a scale where every layer, head and neuron matters to the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                inputs = parameter.shape[-1] if parameter.ndim < 4 else parameter[0].numel()
                parameter.copy_(noise / inputs**0.5)
            else:
                parameter.add_(0.1 * noise)
    model.requires_grad_(False)
    return model
