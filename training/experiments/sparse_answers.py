"""Dynamic-LLaVA's predictors against rules that look at nothing, by the perplexity of answers.

    planner experiment dynamic [--seeds 0,1,2] [--samples 2000]

After Table 3 of arXiv 2412.00876 (an answer's tokens kept by the predictor, at random, every other
one, the latest ones, by H2O) and its Tables 5 and 17 (keep rates swept), beside pictures that are
down-sampled. Answers are descriptions of rendered scenes, fed token by token into a cache under the
policy, and every token's likelihood is what the model gave it there. Predictors are trained for
tiny-llava as it is, one pair for each pair of rates and seed. Speed is of a few answers, under
every method in turn, several times.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from planner.ir.cost import Workload
from planner.models.running.kv_cache import answers_stored, cache_among, cache_argument
from planner.models.running.skipping import obeying
from planner.plan import Plan
from planner.planning.plan_costs import PlanCosts
from planner.planning.selectors import stages_of
from planner.planning.selectors.trained_predictors import WEIGHTS
from planner.training.config import CONFIGS
from planner.training.data import Conversation, Packer, SceneQuestions
from planner.training.data.packing import IGNORE
from planner.training.experiments.kept_results import Bench, Runs, kept_or_measured
from planner.training.experiments.over_seeds import paired_bootstrap
from planner.training.experiments.results_page import table
from planner.training.recipes import load_recipe

IMAGE_RATE, ANSWER_RATE = 0.2, 0.5
_CONFIG = CONFIGS / "dynamic-llava.yaml"
# Tokens of a question and its answer, the image left out, at most.
_MOST_TEXT = 400
# How often every method is timed.
_ROUNDS = 5


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str  # for users
    # A selector, and `kv` a policy of the cache, "" for none; FOLDER stands for the predictors,
    # COUNT for as many image tokens as they keep.
    tokens: str = ""
    kv: str = ""
    # Image and answer tokens that the predictors are trained to keep.
    rates: tuple[float, float] = (IMAGE_RATE, ANSWER_RATE)

    @property
    def is_trained(self) -> bool:
        """Whether it asks predictors."""
        return "FOLDER" in self.tokens + self.kv


_PREDICTED = "dynamic-llava:FOLDER"


def _methods() -> Iterator[Method]:
    yield Method("base model")
    # As many image tokens as .2 and, nearly, .4 of 49.
    for side in (3, 4):
        yield Method(f"image down-sampled, {side} x {side}", f"downsample:side={side}")
    yield Method("random image tokens", "random:keep=COUNT,k=2")
    yield Method("image predictor", _PREDICTED)
    yield Method("both predictors", _PREDICTED, _PREDICTED)
    for rule in ("random", "alternate", "recent"):
        yield Method(f"answer: {rule}", _PREDICTED, f"answer:{rule},share={ANSWER_RATE}")
    yield Method("H2O", _PREDICTED, "h2o:heavy=0.25,recent=0.25")
    yield Method("H2O, whole image", "", "h2o:heavy=0.25,recent=0.25")
    # Shares are of the prompt, and answers are longer: these hold about half of what the base does.
    yield Method("H2O, longer", _PREDICTED, "h2o:heavy=1,recent=1")
    yield Method("H2O, whole image, longer", "", "h2o:heavy=0.5,recent=0.5")
    for rates in ((IMAGE_RATE, 0.25), (IMAGE_RATE, 0.75), (0.1, ANSWER_RATE), (0.4, ANSWER_RATE)):
        yield Method("both predictors", _PREDICTED, _PREDICTED, rates)


METHODS = tuple(_methods())


@dataclass(frozen=True, eq=False)
class _Bench(Bench):
    """Answers of one seed, and what they lose under methods; `batch_size` are fed together."""

    batch_size: int = 32

    def cell(self, method: Method) -> dict[str, Any]:
        """A method, from its file or measured now."""
        name = "_".join([method.name, *map(str, method.rates)]).replace(" ", "-").replace(":", "")
        path = self.work / "dynamic" / f"seed-{self.seed}" / f"{name}.json"
        identity = [repr(method), self.samples, self.changes]
        return kept_or_measured(path, identity, lambda: self._measure(method))

    def _trained(self, rates: tuple[float, float]) -> Path:
        """The folder of predictors with these rates, trained before or now."""
        labels = [f"dynamic_{rates[0]}-{rates[1]}", *self.changes]
        label = "_".join(labels).replace("=", "-").replace("/", "-")

        def train(settings: list[str]) -> None:
            run, config = load_recipe(_CONFIG, [*settings, *self.overrides])
            changed = config.model_dump()
            kept = {"vision_keep_rate": rates[0], "output_text_keep_rate": rates[1]}
            changed["predictors"] |= kept
            run(type(config)(**changed))

        return self.trained(f"predictors that keep {rates}", label, WEIGHTS, train)

    def speeds(self) -> list[float]:
        """Of the first answers under every method, tokens a second of processor time over those of
        the base model: the median of rounds, in each of which all methods take their turn."""
        path = self.work / "dynamic" / f"seed-{self.seed}" / "speeds.json"
        identity = [[repr(method) for method in METHODS], self.samples, self.changes]
        return list(kept_or_measured(path, identity, self._timed)["speeds"])

    def _timed(self) -> dict[str, Any]:
        self.say("speed of all methods")
        known = self.load("tiny-llava")
        answers = self._answers(min(self.batch_size, self.samples))
        ratios: list[list[float]] = [[] for _ in METHODS]
        for _ in range(_ROUNDS):
            seconds = []
            for method in METHODS:
                with self._under(method):
                    told = feed(known.model, known.processor, answers)
                seconds.append(sum(each.seconds for each in told))
            for ratio, own in zip(ratios, seconds, strict=True):
                ratio.append(seconds[0] / own)
        return {"speeds": [median(ratio) for ratio in ratios]}

    def _answers(self, count: int) -> SceneQuestions:
        return SceneQuestions("test", count, self.seed, ("describe",))

    @contextmanager
    def _under(self, method: Method) -> Iterator[Plan]:
        """The model obeys a method, whose predictors are trained where they are not yet."""
        folder = str(self._trained(method.rates)) if method.is_trained else ""
        known = self.load("tiny-llava")
        of = int(known.graph.properties["image_tokens"])
        tokens, kv = (text.replace("FOLDER", folder) for text in (method.tokens, method.kv))
        tokens = tokens.replace("COUNT", str(int(of * IMAGE_RATE)))
        plan = Plan.of(known.graph, tokens=stages_of(tokens, of, of), kv=kv)
        with obeying(known.model, known.graph, plan, freeze=True):
            yield plan

    def _measure(self, method: Method) -> dict[str, Any]:
        losses, lengths, costs = [], [], []
        with self._under(method) as plan:
            self.say(f"{method.name} {method.rates}")
            known, answers = self.load("tiny-llava"), self._answers(self.samples)
            model, processor, graph = known.model, known.processor, known.graph
            of = int(graph.properties["image_tokens"])
            for start in range(0, len(answers), self.batch_size):
                chosen = range(len(answers))[start : start + self.batch_size]
                for told in feed(model, processor, [answers[i] for i in chosen]):
                    losses.append(told.loss)
                    lengths.append(told.tokens)
                    load = Workload.default(graph, of, told.prompt - of, told.tokens - 1)
                    costs.append(PlanCosts(graph, load, "llm").of(plan, answers=told.stored))
        return {
            "method": method.name,
            "rates": list(method.rates) if method.is_trained else None,
            "losses": losses,
            "tokens": lengths,
            "kv_bytes": mean(cost["kv"]["plan"] for cost in costs),
            "kv_fraction": mean(cost["kv"]["fraction"] for cost in costs),
            "flops_fraction": mean(cost["flops"]["fraction"] for cost in costs),
        }


@dataclass(frozen=True)
class Told:
    """What a model makes of one answer."""

    prompt: int  # tokens of the prompt
    tokens: int  # of the answer, its end among them
    loss: float  # nats of all of them together
    # How many a policy has stored of those that were fed; None where none decides.
    stored: int | None
    seconds: float  # of processor time, its share of the batch's


@torch.inference_mode()
def feed(model: Any, processor: Any, samples: Sequence[Conversation]) -> list[Told]:
    """Feed answers token by token into a cache, a batch of them; the plan is whatever holds."""
    packer = Packer(processor, _MOST_TEXT, dialogue_share=1.0)
    rows = [packer([sample]) for sample in samples]
    asked = [row["input_ids"][0, row["labels"][0] == IGNORE] for row in rows]
    answers = [row["labels"][0, row["labels"][0] != IGNORE] for row in rows]
    ids, mask = _padded(asked, "left")
    given, _ = _padded(answers, "right")
    pixels = torch.cat([row["pixel_values"] for row in rows])
    lengths = [len(answer) for answer in answers]
    output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, logits_to_keep=1)
    losses = torch.zeros(len(samples))
    stored: list[int | None] = [None] * len(samples)
    began = time.process_time()
    for step in range(max(lengths)):
        wanted = given[:, step]
        each = cross_entropy(output.logits[:, -1].float(), wanted, reduction="none")
        losses += each * torch.tensor([step < length for length in lengths])
        cache = cache_among(output)
        now = answers_stored(cache)
        for row, length in enumerate(lengths):
            # All but its last token were fed.
            if step == length - 1 and now is not None:
                stored[row] = now[row]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        if step < max(lengths) - 1:
            past = {cache_argument(model.forward): cache}
            output = model(input_ids=wanted[:, None], attention_mask=mask, **past)
    seconds = (time.process_time() - began) / len(samples)
    return [
        Told(len(prompt), length, float(loss), kept, seconds)
        for prompt, length, loss, kept in zip(asked, lengths, losses, stored, strict=True)
    ]


def _padded(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor, padded by 0, and which of it is real, int64."""
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True, padding_side=side)
        for part in (rows, [torch.ones_like(row) for row in rows])
    )
    return ids, mask


def dynamic_configurations(runs: Runs) -> Iterator[tuple[Path, Sequence[str]]]:
    """By what all predictors are trained: a configuration and its settings."""
    yield _CONFIG, runs.overrides


def run_dynamic(runs: Runs) -> Iterator[dict[str, Any]]:
    """Train and measure what is missing of the table, and give it back whole."""
    cells: dict[Method, list[dict[str, Any]]] = {method: [] for method in METHODS}
    speeds = []
    for bench in runs.benches(_Bench):
        for method in METHODS:
            cells[method].append(bench.cell(method))
        speeds.append(bench.speeds())
    rows = [_row(method, cells[method], cells[METHODS[0]]) for method in METHODS]
    for row, speed in zip(rows, zip(*speeds, strict=True), strict=True):
        row["speed"] = mean(speed)
    yield runs.facts | {"title": "Dynamic-LLaVA's predictors against rules", "rows": rows}


def _row(method: Method, cells: Sequence[Any], base: Sequence[Any]) -> dict[str, Any]:
    """A method's means over seeds, and its loss a token beside the base model's."""
    nats = [np.divide(cell["losses"], cell["tokens"]) for cell in cells]
    of_base = [np.divide(cell["losses"], cell["tokens"]) for cell in base]
    row: dict[str, Any] = {"method": method.name, "rates": cells[0]["rates"], "kv": method.kv}
    for name in ("kv_bytes", "kv_fraction", "flops_fraction"):
        row[name] = mean(cell[name] for cell in cells)
    each = [float(np.exp(np.sum(c["losses"]) / np.sum(c["tokens"]))) for c in cells]
    row["perplexities"] = each
    if method != METHODS[0]:
        pairs = [own - other for own, other in zip(nats, of_base, strict=True)]
        row["against_base"] = paired_bootstrap(pairs)
    return row


def dynamic_page(results: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    cells = []
    for row in results["rows"]:
        image, answer = row["rates"] or ("", "")
        known = row.get("against_base")
        cells.append(
            [
                row["method"],
                str(image),
                str(answer),
                f"{row['flops_fraction']:.1%}",
                f"{row['kv_bytes'] / 1024:.1f}",
                f"{row['kv_fraction']:.1%}",
                f"{row['speed']:.2f}",
                f"{mean(row['perplexities']):.4f}",
                f"{known['difference']:+.4f} ({known['low']:+.4f} to {known['high']:+.4f})"
                if known
                else "",
            ]
        )
    heads = ["method", "image rate", "answer rate", "FLOPs of the prefill", "KiB of KV", "KV"]
    heads += ["tokens/s", "perplexity", "- base, nats a token"]
    runs = len(results["seeds"])
    lines = [
        f"# {results['title']}",
        "",
        f"tiny-llava; {runs} training run{'s' * (runs > 1)} of the predictors, "
        f"{results['samples']} descriptions each, fed token by token into the cache. FLOPs and KV "
        "bytes are over the base model's, the bytes at an answer's end; so are tokens a second "
        "of processor time, 32 answers being decoded together. Differences are of the "
        "mean loss a token, in nats, with 95 % intervals by a paired bootstrap over runs and "
        "answers. Rows named after a rule keep the image tokens that the image predictor chooses, "
        "and so does H2O but for the whole image. H2O's caches are as long as half of the prompt; "
        "the longer ones as twice the prompt that the predictor leaves, or as the whole prompt.",
        "",
        *table(heads, cells),
        "",
        f"    {results['command']}",
    ]
    return "\n".join(lines) + "\n"
