"""Utilities: what every switch is worth.

Three sources. ``prior`` needs no weights: it follows what the literature agrees on, and nothing
finer. ``uniform`` values all work alike. A file holds measured values.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from planner.arrays import read_arrays
from planner.files import write_bytes
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Site
from planner.solver.problem import Floats

# How much of the model's whole worth hangs on the image tokens, and how fast it saturates: half of
# the tokens keep 80 % of it, an eighth 46 %. Token pruning papers report losses of that order.
_TOKEN_SHARE = 0.5
_TOKEN_SATURATION = 31.0
# Values of --utilities that take a look at weights.
OF_WEIGHTS = ("auto", "magnitude")
# Ways to lose less without training; "" is none.
RECOVERIES = ("", "refit", "compensate")


@dataclass(frozen=True, eq=False)
class Utilities:
    """Worth of switches."""

    name: str  # ``prior``, ``uniform`` or the file's name
    sites: Mapping[str, Floats]  # site name -> (switches,) for heads, mlp and layer sites
    tokens: float  # worth of all image tokens
    # A fraction r of them is worth tokens * log(1 + saturation * r) / log(1 + saturation).
    saturation: float = _TOKEN_SATURATION
    # (site, site) -> what both lose together besides what each loses alone. Heads and MLPs are off
    # where they keep nothing.
    pairs: Mapping[tuple[str, str], float] = field(default_factory=dict)
    # Of image tokens kept, ascending; and (fractions, layers): what a layer that is off loses
    # besides, at each.
    token_fractions: Floats = field(default_factory=lambda: np.zeros(0))
    token_losses: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    recover: str = ""  # the recovery without which plans made of these values are worth nothing

    def with_tokens(self, fraction: float, layers: int) -> Floats | None:
        """What each layer that is off loses besides at a fraction of the image tokens."""
        if not len(self.token_fractions):
            return None
        known = np.append(self.token_fractions, 1.0)
        whole = np.vstack([self.token_losses, np.zeros(layers)])
        return np.array([np.interp(fraction, known, column) for column in whole.T])

    def of_tokens(self, fraction: float) -> float:
        """Worth of keeping a fraction of the image tokens."""
        return self.tokens * math.log1p(self.saturation * fraction) / math.log1p(self.saturation)

    def of_site(self, site: Site) -> Floats:
        """Worth of a site's switches."""
        if site.name not in self.sites:
            raise InputError(f"the utilities '{self.name}' say nothing about {site.name}")
        values = np.asarray(self.sites[site.name], dtype=np.float64)
        if values.shape != (site.switches,):
            raise InputError(
                f"the utilities '{self.name}' have {values.size} values for {site.name}, "
                f"which has {site.switches} switches"
            )
        return values

    def of_layer(self, sites: Sequence[Site]) -> float:
        """Worth of a layer as a whole, where nothing inside it is switched.

        Its own value, for switches are not additive: each of several that do the same may be worth
        little while all of them are worth much. Without one, the sum of what is inside.
        """
        own = next((s for s in sites if s.kind == "layer"), None)
        if own is not None and own.name in self.sites:
            return float(self.of_site(own).sum())
        return sum(float(self.of_site(site).sum()) for site in sites if site is not own)


def depth_weight(layer: int, layers: int) -> float:
    """Importance of a layer by depth alone.

    The first layers matter most, importance falls towards the last quarter, and the very last layer
    matters again: the shape that layer-removal studies report (for example ShortGPT's block
    influence, arXiv 2403.03853).
    """
    depth = layer / max(1, layers - 1)
    return 0.5 + 0.5 * (1 - depth) + 1.5 * math.exp(-8 * depth) + 0.5 * math.exp(-16 * (1 - depth))


def prior(graph: Graph, work: Mapping[str, float]) -> Utilities:
    """Utilities without weights: share of the work, times depth, diminishing inside a site.

    Which head or group of a site is better cannot be known without weights. The diminishing values
    make plans narrow many sites a little rather than a few entirely.

    `work`: site name -> cost of all its switches, in any one unit.
    """
    whole = sum(work.values()) or 1.0
    sites: dict[str, Floats] = {}
    for site in graph.sites:
        share = work.get(site.name, 0.0) / whole * depth_weight(site.layer, graph.layers)
        ranks = np.arange(site.switches, dtype=np.float64)
        falling = 2 * (site.switches - ranks) / (site.switches * (site.switches + 1))
        sites[site.name] = share * falling
    everything = sum(float(v.sum()) for name, v in sites.items() if not name.startswith("layer."))
    return Utilities("prior", sites, _TOKEN_SHARE * everything)


def uniform(graph: Graph, work: Mapping[str, float]) -> Utilities:
    """Every unit of work is worth the same, wherever it is done."""
    whole = sum(work.values()) or 1.0
    sites = {
        site.name: np.full(site.switches, work.get(site.name, 0.0) / whole / site.switches)
        for site in graph.sites
    }
    return Utilities("uniform", sites, 1.0, saturation=1e-9)


# Arrays of a utilities file that are no sites.
_TEXTS = ("fingerprint", "about", "recover")
_SCALARS = ("tokens", "saturation")
_TOGETHER = frozenset(("pair_losses", "token_fractions", "token_losses"))
# Sums of utilities must stay finite.
_LARGEST = 1e100


def save_utilities(path: Path, utilities: Utilities, graph: Graph, about: str = "") -> None:
    """Write measured utilities, one array per site of a graph, to an ``.npz`` file, whole or not at
    all; equal ones give equal bytes.

    `about`: where the values come from, for people and programs.
    """
    arrays = {site.name: utilities.of_site(site) for site in graph.sites}
    stream = io.BytesIO()
    np.savez(
        stream,
        fingerprint=np.array(str(graph.properties["fingerprint"])),
        about=np.array(about),
        recover=np.array(utilities.recover),
        tokens=np.float64(utilities.tokens),
        saturation=np.float64(utilities.saturation),
        **_together(utilities),  # type: ignore[arg-type]
        **arrays,  # type: ignore[arg-type]
    )
    write_bytes(path, stream.getvalue())


def _together(utilities: Utilities) -> dict[str, npt.NDArray[np.generic]]:
    """Arrays of what is worth something together; none where nothing of it was measured."""
    found: dict[str, npt.NDArray[np.generic]] = {}
    if utilities.pairs:
        found["pair_names"] = np.array([list(pair) for pair in utilities.pairs])
        found["pair_losses"] = np.array(list(utilities.pairs.values()))
    if len(utilities.token_fractions):
        found["token_fractions"] = utilities.token_fractions
        found["token_losses"] = utilities.token_losses
    return found


def load_utilities(path: Path, graph: Graph) -> Utilities:
    """Read measured utilities from an ``.npz`` file with one array per site name.

    ``tokens`` (worth of all image tokens) and ``saturation`` are optional scalars; ``fingerprint``
    names the model they were measured on. InputError where there is no such file, a broken one, or
    one of another model.
    """
    arrays = read_arrays(path, "utilities file", ".npz with one array per site")
    texts = {name: str(arrays.pop(name)) for name in _TEXTS if name in arrays}
    names = arrays.pop("pair_names", np.zeros((0, 2)))
    together = {name: _numbers(path, name, arrays.pop(name)) for name in _TOGETHER & set(arrays)}
    sites = {name: _numbers(path, name, values) for name, values in arrays.items()}
    recover = texts.get("recover", "")
    if recover not in RECOVERIES:
        raise InputError(f"the utilities in '{path}' count on '{recover}', which is no recovery")
    expected = str(graph.properties.get("fingerprint", ""))
    if texts.get("fingerprint", expected) != expected:
        raise InputError(
            f"the utilities in '{path}' were measured on another model "
            f"({texts['fingerprint']}), not on '{graph.name}' ({expected})"
        )
    unknown = [n for n in sites if n not in graph.sites_by_name and n not in _SCALARS]
    if unknown:
        raise InputError(
            f"the utilities in '{path}' value {unknown[0]}, which '{graph.name}' does not have"
        )
    tokens = float(sites.pop("tokens", np.float64(0.0)))
    saturation = float(sites.pop("saturation", np.float64(_TOKEN_SATURATION)))
    if saturation <= 0:
        raise InputError(f"the saturation in '{path}' must be more than 0")
    losses = together.get("pair_losses", np.zeros(0))
    fractions = together.get("token_fractions", np.zeros(0))
    by_layer = together.get("token_losses", np.zeros((0, 0)))
    if names.shape != (len(losses), 2) or len(by_layer) != len(fractions):
        raise InputError(f"the pairs in '{path}' do not have one loss each")
    if len(fractions) and by_layer.shape[1:] != (graph.layers,):
        raise InputError(f"the token losses in '{path}' are not of {graph.layers} layers")
    pairs = {(str(a), str(b)): float(x) for (a, b), x in zip(names, losses, strict=True)}
    if unknown := sorted({name for pair in pairs for name in pair} - set(graph.sites_by_name)):
        raise InputError(
            f"the utilities in '{path}' pair {unknown[0]}, which '{graph.name}' does not have"
        )
    return Utilities(path.name, sites, tokens, saturation, pairs, fractions, by_layer, recover)


def _numbers(path: Path, name: str, values: npt.NDArray[np.generic]) -> Floats:
    if values.dtype.kind == "U":
        raise InputError(f"the utilities in '{path}' are text for {name}, not numbers")
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise InputError(f"the utilities in '{path}' are not finite for {name}")
    if (np.abs(numbers) > _LARGEST).any():
        raise InputError(f"the utilities in '{path}' are larger than {_LARGEST:g} for {name}")
    if name in _SCALARS and numbers.shape:
        raise InputError(f"'{name}' in '{path}' is not a single number")
    return numbers
