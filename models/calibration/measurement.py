"""A whole calibration: every sample, every switch, token stages; averages and rank correlations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm, spearmanr
from torch import Tensor, nn

from planner.documents import digest_of
from planner.ir.errors import InputError, check_known
from planner.ir.graph import Graph
from planner.loading import count_image_tokens
from planner.models.calibration.leave_one_out import MEASURES, losses_without, switches_of
from planner.models.calibration.replay import NOT_FINITE, Replay
from planner.models.calibration.samples import Sample
from planner.models.calibration.store import Store
from planner.models.calibration.taylor import DRAWS, taylor
from planner.models.calibration.token_worth import FRACTIONS, fit, token_losses
from planner.models.running.masked import MaskedExecutor
from planner.planning.switches import SwitchSet
from planner.planning.utilities import Utilities
from planner.solver.problem import Floats

METHODS = ("leave-one-out", "taylor")
# Before which image tokens are dropped.
TOKEN_LAYER = SwitchSet.parse("tokens").token_layers[0]


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What was measured, in nats per answer token."""

    # By site name (switches,): mean over samples; with ``loss`` see `not_negative`.
    sites: dict[str, Floats]
    tokens: float  # worth of all image tokens; 0 where there are none
    saturation: float | None  # of their curve, see `Utilities`; None where there are none
    token_losses: tuple[tuple[float, float], ...]  # (kept fraction, mean loss), ascending
    selector: str  # what picked tokens; "" where there are none
    # Spearman, leave-one-out against Taylor: of ``all`` switches, and of each kind; NaN where one
    # side is constant, empty with the method ``taylor``.
    rank_correlation: dict[str, float]
    method: str
    measure: str
    samples: int

    def utilities(self, name: str) -> Utilities:
        """What a solver takes."""
        if self.saturation is None:
            return Utilities(name, self.sites, self.tokens)
        return Utilities(name, self.sites, self.tokens, self.saturation)


def calibrate(
    model: nn.Module,
    graph: Graph,
    samples: Sequence[Sample],
    *,
    measure: str = "kl",
    method: str = "leave-one-out",
    batch: int = 16,
    seed: int = 0,
    partial: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibrated:
    """Measure what every switch is worth.

    Equal arguments give equal numbers, whether in one run or continued from `partial`.

    Args:
        model: dense, in evaluation mode; left as it was.
        graph: with switches assigned (`planner.planning.switches.with_switches`).
        measure: ``loss`` judges by the answers' loss, ``kl`` by the output distribution.
        method: ``leave-one-out`` switches each off (and runs ``taylor`` as well, to compare);
            ``taylor`` alone takes one backward pass per sample.
        batch: switches measured at once.
        seed: of the answers that ``taylor`` draws with ``kl``.
        partial: where to keep partial results; whoever keeps what comes out removes it.

    Raises InputError: for bad arguments, and for outputs that are not finite.
    """
    check_known("method", method, METHODS)
    check_known("measure", measure, MEASURES)
    if not samples or batch < 1:
        raise InputError("a calibration needs at least one sample, and a batch of at least 1")
    run = _Run(model, graph, samples, measure, method, batch, seed, partial, progress)
    try:
        for index in range(len(samples)):
            run.sample(index)
    finally:
        # What was measured before an interrupt, or before an error, is not measured again.
        run.store.save(now=True)
    return run.result()


@dataclass(eq=False)
class _Run:
    """State of one calibration, see `calibrate`."""

    model: nn.Module
    graph: Graph
    samples: Sequence[Sample]
    measure: str
    method: str
    batch: int
    seed: int
    partial: Path | None
    progress: Callable[[int, int], None]

    def __post_init__(self) -> None:
        model, graph, samples = self.model, self.graph, self.samples
        self.masked = MaskedExecutor(model, graph)
        self.switches = switches_of(graph)
        self.layer = TOKEN_LAYER
        self.image_tokens = [count_image_tokens(model, dict(s.inputs)) for s in samples]
        self.has_tokens = all(self.image_tokens) and self.layer < graph.layers
        self.selector = self._selector() if self.has_tokens else ""
        shapes: dict[str, tuple[int, ...]] = {"taylor": (len(samples), len(self.switches))}
        if self.method == "leave-one-out":
            shapes["leave_one_out"] = shapes["taylor"]
        if self.has_tokens:
            shapes["tokens"] = (len(samples), 2, len(FRACTIONS))
        options = (self.measure, self.method, self.batch, self.seed, self.selector)
        self.store = Store(self.partial, settings_key(model, graph, samples, options), shapes)

    def _selector(self) -> str:
        """The usual selector where this model lets its attention be seen, else a uniform grid."""
        usual = SwitchSet.parse("tokens").token_selector
        try:
            self._tokens(0, usual)
        except InputError:
            return "uniform"
        return usual

    def _tokens(self, index: int, selector: str) -> Floats:
        replay, count = self._replay(index, len(FRACTIONS)), self.image_tokens[index]
        return token_losses(self.graph, replay, count, self.layer, selector, self.measure)

    def sample(self, index: int) -> None:
        """Everything that is still missing of one sample."""
        arrays = self.store.arrays
        if np.isnan(arrays["taylor"][index]).any():
            replay = self._replay(index, DRAWS if self.measure == "kl" else 1)
            seed = self.seed * len(self.samples) + index
            self._note(
                arrays["taylor"][index],
                taylor(self.masked, replay, self.switches, self.measure, seed),
            )
        if "tokens" in arrays and np.isnan(arrays["tokens"][index]).any():
            self._note(arrays["tokens"][index], self._tokens(index, self.selector))
        if "leave_one_out" in arrays:
            self._leave_one_out(index, arrays["leave_one_out"][index])

    def _leave_one_out(self, index: int, row: Floats) -> None:
        replay: Replay | None = None
        for start in range(0, len(self.switches), self.batch):
            stop = start + self.batch
            if not np.isnan(row[start:stop]).any():
                continue
            replay = replay or self._replay(index, self.batch)
            some = [[switch] for switch in self.switches[start:stop]]
            self._note(row[start:stop], losses_without(self.masked, replay, some, self.measure))

    def _replay(self, index: int, rows: int) -> Replay:
        return Replay(self.model, self.masked.layers, self.samples[index], rows)

    def _note(self, place: Floats, values: Floats) -> None:
        if not np.isfinite(values).all():
            raise InputError(NOT_FINITE)
        place[...] = values
        self.store.save()
        self.progress(self.store.done, self.store.total)

    def result(self) -> Calibrated:
        """Averages."""
        arrays = self.store.arrays
        estimate = arrays["taylor"].mean(0)
        effects = arrays[self.method.replace("-", "_")]
        worth = effects.mean(0)
        sites: dict[str, list[float]] = {}
        values = not_negative(effects) if self.measure == "loss" else worth
        for switch, value in zip(self.switches, values.tolist(), strict=True):
            sites.setdefault(switch.site.name, []).append(value)
        correlation = {}
        if "leave_one_out" in arrays:
            kinds = np.array([switch.site.kind for switch in self.switches])
            chosen = {"all": np.ones(len(kinds), dtype=bool)}
            chosen |= {kind: kinds == kind for kind in dict.fromkeys(kinds.tolist())}
            correlation = {n: _spearman(worth[some], estimate[some]) for n, some in chosen.items()}
        tokens, saturation = 0.0, None
        curve: tuple[tuple[float, float], ...] = ()
        if "tokens" in arrays:
            fractions, losses = arrays["tokens"].mean(0)
            tokens, saturation = fit(fractions, losses)
            curve = tuple(zip(fractions.tolist(), losses.tolist(), strict=True))
        return Calibrated(
            {name: np.array(values) for name, values in sites.items()},
            tokens,
            saturation,
            curve,
            self.selector,
            correlation,
            self.method,
            self.measure,
            len(self.samples),
        )


def not_negative(effects: Floats) -> Floats:
    """Means over samples, given that no switch does harm: (samples, switches) to (switches,).

    With few samples, the loss may fall by chance when a switch is off, and plans would then leave
    the switch off whatever the budget. So a switch's value is the mean of a truncated normal
    distribution: the mean over samples and its standard error, cut off below 0. That is nearly the
    mean if it is clearly positive, and else small and positive.
    """
    mean: Floats = effects.mean(0)
    if len(effects) > 1:
        error = effects.std(0, ddof=1) / np.sqrt(len(effects))
        known = error == 0
        error = np.where(known, 1, error)
        hazard = np.exp(norm.logpdf(-mean / error) - norm.logsf(-mean / error))
        mean = np.where(known, mean, mean + error * hazard)
    return mean.clip(min=0)


def _spearman(one: Floats, other: Floats) -> float:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    found: Any = spearmanr(one, other)
    return float(found.statistic)


def settings_key(
    model: nn.Module, graph: Graph, samples: Sequence[Sample], options: Sequence[object]
) -> str:
    """Tells apart what partial results are of, for a `Store`."""
    facts = {
        "fingerprint": graph.properties["fingerprint"],
        "weights": weights_digest(model),
        "sites": {s.name: s.switches for s in graph.sites},
        "samples": [sample.digest() for sample in samples],
        "options": list(options),
    }
    return digest_of(facts)


def weights_digest(module: nn.Module) -> str:
    """Tells checkpoints of one architecture apart: by sums of all rows, and a few numbers each."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        # Sums of bit patterns are exact: equal however many threads or devices add up.
        numbers = value.detach().to(torch.float32).contiguous()
        sums = numbers.view(torch.int32).sum(-1, dtype=torch.int64)
        found.update(name.encode())
        for some in (numbers.flatten()[:64], sums):
            found.update(some.cpu().numpy().tobytes())
    return found.hexdigest()
