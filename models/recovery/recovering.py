"""One model, its samples and a way to recover: plans made, and weights made for them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner.arrays import read_arrays
from planner.files import output_folder
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.calibration.builtin import BUILTIN_SAMPLES, builtin_samples, folder_of
from planner.models.calibration.magnitude import magnitude_worth
from planner.models.calibration.measurement import calibrate, weights_digest
from planner.models.calibration.samples import Sample, drawn
from planner.models.recovery.arranging import can_move
from planner.models.recovery.moments import Moments, narrowable, site_moments
from planner.models.recovery.refit import refitted
from planner.models.recovery.removal import Chain, chain_of
from planner.models.recovery.trials import tried_worth
from planner.models.running.bindings import BoundLayer, BoundSite, bind
from planner.models.running.program import Program
from planner.models.running.session import Session, stock_copy
from planner.plan import Plan
from planner.planning.catalog import utilities_beside
from planner.planning.compiler import pose
from planner.planning.graph_cache import cache_folder
from planner.planning.request import Request
from planner.planning.switches import SwitchSet, with_switches
from planner.planning.utilities import OF_WEIGHTS, RECOVERIES, Utilities, save_utilities
from planner.progress import progress_bar
from planner.solver.problem import Floats

# Least squares of a site want many tokens a feature; a minute writes so much built-in text.
REFIT_SAMPLES = 64
# Changes of what is measured make files in the cache unreachable.
_VERSION = 4


@dataclass(frozen=True)
class Measured:
    """A utilities file, and how it came about."""

    path: Path
    how: str  # one phrase for people, such as ``first-order KL on 8 built-in samples``


@dataclass(eq=False)
class Recovering:
    """What utilities and weights under plans are made from.

    Raises InputError: there is no such recovery.
    """

    model: Any  # dense, in evaluation mode
    graph: Graph
    recover: str = ""  # one of `RECOVERIES`
    samples: Sequence[Sample] | None = None  # the user's; by default built-in ones
    processor: Any | None = None  # of an image-text model, for built-in samples
    # Called with the number of measurements done, and of all.
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    _chains: dict[tuple[str, int], Chain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recover not in RECOVERIES:
            known = ", ".join(name for name in RECOVERIES if name)
            raise InputError(f"unknown recovery '{self.recover}': choose from {known}")

    @cached_property
    def layers(self) -> tuple[BoundLayer, ...]:
        """The model's decoder layers."""
        return bind(self.model, self.graph)

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Of all sites of the dense model."""
        samples = self.samples
        if samples is None:
            samples = builtin_samples(self.model, self.processor, REFIT_SAMPLES)
        return site_moments(self.model, self.layers, samples, progress=self.progress)

    def chain(self, site: BoundSite) -> Chain:
        """The removal chain of a site."""
        # Where neurons move, it does not depend on how they are divided.
        key = (site.site.name, 0 if can_move(site) else site.site.switches)
        if key not in self._chains:
            self._chains[key] = chain_of(site, self.moments[site.site.name])
        return self._chains[key]

    def worth(self, graph: Graph, samples: Sequence[Sample]) -> dict[str, Floats]:
        """What heads and MLP groups of a graph are worth under ``refit``, tried on samples."""
        measured = bind(self.model, graph), self.moments, self.chain, samples, self.progress
        return tried_worth(self.model, graph, *measured)

    def weights(self, plan: Plan) -> Mapping[str, Tensor]:
        """Parameters to replace for a plan; none without a recovery."""
        if self.recover != "refit":
            return {}
        narrowed = replace(plan, tokens=(), kv="")
        program = Program.build([narrowed], self.graph, self.layers)
        return refitted(program, self.moments, self.chain)

    def means(self) -> dict[str, Tensor]:
        """Path of a sink -> mean of its input features."""
        sites = {site.site.name: site for site in narrowable(self.layers)}
        return {sites[name].sink.path: found.mean for name, found in self.moments.items()}

    def utilities(self, request: Request) -> Measured:
        """What switches are worth under this recovery: as known already, or measured now.

        A file ``utilities.npz`` beside the weights counts where it was measured on them and the
        user gives no samples; then what is in the cache. Without a recovery half the Fisher
        information of every switch is measured (`planner.models.calibration.taylor`), under
        ``refit`` heads and MLP groups by the removal chain of their site, held against trials.
        Where built-in samples cannot be made or run, and where a backward pass does not fit in
        memory, weight norms say, as they do where the request asks for ``magnitude``.
        """
        asked = request.utilities == "magnitude"
        if asked and self.recover == "refit":
            raise InputError("recovery by refit measures what counts on it: give no utilities")
        like_heads = SwitchSet.parse(request.switches).like_heads
        beside = utilities_beside(folder_of(self.model))
        special = asked or self.samples or request.mlp_groups or like_heads
        if beside and not (special or self.recover == "refit") and self._is_of_this(beside):
            return Measured(beside, "the file beside the weights")
        graph = with_switches(self.graph, request.mlp_groups, like_heads)
        name = "removal-chains" if self.recover == "refit" else "first-order-kl"
        path = output_folder(cache_folder() / "utilities") / f"{name}-{self._key(graph)}.npz"
        if asked:
            return self._magnitude(graph, "as asked for")
        if path.is_file():
            return Measured(path, f"{_about(path).get('how')}, measured before")
        try:
            return self._measured(graph, path)
        except (torch.OutOfMemoryError, MemoryError):
            if self.recover == "refit":
                raise
            return self._magnitude(graph, "a backward pass does not fit in memory")
        except InputError as error:
            if self.recover == "refit" or self.samples:
                raise
            return self._magnitude(graph, str(error))

    def _is_of_this(self, utilities: Path) -> bool:
        """Whether a file was measured on these weights, and on all that can be switched."""
        measured = {
            name for name in read_arrays(utilities, "utilities file", ".npz") if "." in name
        }
        return _about(utilities).get("weights") == self._digest and measured == set(
            self.graph.sites_by_name
        )

    def _measured(self, graph: Graph, path: Path) -> Measured:
        samples = self.samples or builtin_samples(self.model, self.processor)
        # Under refit only what chains do not know is taken from this: a few samples do.
        few = drawn(samples, BUILTIN_SAMPLES if self.recover == "refit" else len(samples))
        found = calibrate(
            self.model, graph, few, measure="kl", method="taylor", progress=self.progress
        )
        own = "" if self.samples else "built-in "
        if self.recover != "refit":
            how = f"first-order KL on {len(samples)} {own}samples"
            return _saved(path, found.utilities(path.name), graph, how)
        sites = found.sites | self.worth(graph, samples)
        utilities = replace(found, sites=sites).utilities(path.name)
        utilities = replace(utilities, recover=self.recover)
        return _saved(path, utilities, graph, f"removal chains on {own}samples")

    def _magnitude(self, graph: Graph, why: str) -> Measured:
        worth = magnitude_worth(graph, bind(self.model, graph))
        path = output_folder(cache_folder() / "utilities") / f"magnitude-{self._key(graph)}.npz"
        return _saved(path, Utilities(path.name, worth, 0.0), graph, f"weight norms ({why})")

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self.model)

    def _key(self, graph: Graph) -> str:
        facts = {
            "version": _VERSION,
            "fingerprint": graph.properties["fingerprint"],
            "weights": self._digest,
            "sites": {site.name: site.switches for site in graph.sites},
            "samples": [sample.digest() for sample in self.samples or ()],
        }
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def measurable(request: Request, session: Session) -> Request:
    """The request, by the prior where weights are packed, or elsewhere: these are not measured."""
    if request.utilities == "auto" and session.has_obstacles:
        return replace(request, utilities="prior")
    return request


@dataclass(eq=False)
class Measuring:
    """Measures what switches are worth, of a model that is planned already."""

    session: Session
    samples: Sequence[Sample] | None = None  # see `Recovering`
    processor: Any = None  # see `Recovering`

    def __call__(self, graph: Graph, request: Request) -> Request:
        """A request whose utilities are of weights, with those that were measured.

        Raises InputError: the request does not fit the model; that comes up before the measuring.
        """
        if request.utilities not in OF_WEIGHTS:
            return request
        pose(graph, replace(request, utilities="prior"))
        bar = progress_bar("measure what switches are worth", sys.stderr.isatty())
        with bar as shown, torch.inference_mode(False), torch.enable_grad():
            model = stock_copy(self.session)
            found = Recovering(model, graph, "", self.samples, self.processor, shown)
            return replace(request, utilities=found.utilities(request).path)


def _saved(path: Path, utilities: Utilities, graph: Graph, how: str) -> Measured:
    save_utilities(path, utilities, graph, json.dumps({"how": how}))
    return Measured(path, how)


def _about(path: Path) -> dict[str, Any]:
    """What is written in a utilities file about itself."""
    found: dict[str, Any] = json.loads(str(read_arrays(path, "utilities file", ".npz")["about"]))
    return found
