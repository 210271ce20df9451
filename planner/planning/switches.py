"""Switch sets: which axes a plan may use, and how finely MLPs are divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.ir.errors import InputError
from planner.ir.graph import Graph, Site
from planner.planning.selectors import KVPolicy, Selector, counted, parse, parse_kv_policy
from planner.planning.unit_counting import Counting, HeadCounting, counting_of

AXES = ("tokens", "layers", "heads", "mlp")
_SITE_KIND = {"layers": "layer", "heads": "heads", "mlp": "mlp"}
# Where tokens are dropped unless told otherwise: before the third decoder layer, as FastV (K = 2,
# arXiv 2403.06764) and Dynamic-LLaVA (section 3 of arXiv 2412.00876) do.
_TOKEN_LAYER = 2


@dataclass(frozen=True, slots=True)
class SwitchSet:
    """What may be switched."""

    name: str  # as the user writes it
    axes: tuple[str, ...]  # some of `AXES`
    counting: Counting | None = None  # where switches are counted, as AdaLLaVA does
    token_layers: tuple[int, ...] = (_TOKEN_LAYER,)  # before which image tokens may be dropped
    token_selector: str = "fastv"  # the rule that picks them
    # Image tokens kept at each of `token_layers`, where a selector fixes them, or at most.
    token_counts: tuple[int, ...] | None = None
    selector: Selector | None = None  # `token_selector` itself, where the user gave one
    kv: KVPolicy | None = None  # what the cache holds; None keeps everything

    @staticmethod
    def parse(text: str) -> SwitchSet:
        """Read ``all``, ``adallava-l``, ``adallava-h:unit=8`` or axes joined by commas."""
        if not isinstance(text, str):
            raise InputError(f"switches is {text!r:.60}: give a text such as 'layers,heads'")
        if text == "all":
            return SwitchSet("all", AXES)
        if counting := counting_of(text):
            in_units = isinstance(counting, HeadCounting)
            return SwitchSet(text, ("heads", "mlp") if in_units else ("layers",), counting)
        axes = tuple(part.strip() for part in text.split(",") if part.strip())
        unknown = [axis for axis in axes if axis not in AXES]
        if unknown or not axes:
            raise InputError(
                f"unknown switches '{', '.join(unknown) or text}': "
                f"choose from {', '.join(AXES)}, or all, adallava-l, adallava-h"
            )
        return SwitchSet(text, tuple(axis for axis in AXES if axis in axes))

    def with_selector(
        self, text: str, image_tokens: int, per_run: int = 0, tiles: tuple[int, int] = (1, 0)
    ) -> SwitchSet:
        """The same switches with image tokens dropped as ``fastv:k=2,r=0.5``, say, has it.

        `per_run`, `tiles`: as for `planner.planning.selectors.counted`, whose errors it raises.
        """
        selector = parse(text)
        counts = counted(selector, image_tokens, per_run, tiles)
        return replace(
            self,
            axes=tuple(axis for axis in AXES if axis in (*self.axes, "tokens")),
            token_layers=tuple(selector.layers),
            token_selector=str(selector),
            token_counts=counts,
            selector=selector,
        )

    def with_kv_policy(self, text: str) -> SwitchSet:
        """The same switches with a KV policy, such as ``h2o:heavy=0.2,recent=0.2``.

        Where it hides images, tokens are dropped by a selector that the user gave alone.
        """
        policy, axes = parse_kv_policy(text), self.axes
        if policy.hides_images and self.selector is None:
            axes = tuple(axis for axis in axes if axis != "tokens")
        return replace(self, axes=axes, kv=policy)

    @property
    def like_heads(self) -> bool:
        """Whether MLPs are divided into as many groups as there are heads."""
        return isinstance(self.counting, HeadCounting)

    def usable(self, graph: Graph) -> tuple[Site, ...]:
        """The graph's sites on these axes."""
        kinds = {_SITE_KIND[axis] for axis in self.axes if axis in _SITE_KIND}
        return tuple(site for site in graph.sites if site.kind in kinds)


def mlp_switches(width: int, heads: int, like_heads: bool = False) -> int:
    """Into how many groups the neurons of an MLP are divided.

    Groups are multiples of 128 neurons where the width allows it, so that surviving groups fill
    whole tiles of a GPU kernel (11008 = 43 x 256, 13824 = 36 x 384), and about as many as heads;
    else of 64 (2752 = 43 x 64), which fill those of a CPU in bfloat16. Otherwise, and where
    `like_heads` asks for the papers' division, there are as many as heads.
    """
    as_heads = max(1, min(heads, width))
    if like_heads:
        return as_heads
    # Of a width of two large primes there would be one giant group, or very many.
    for tile, fewest in ((128, heads / 3), (64, heads)):
        most = min(width // tile, 4 * heads)
        groups = [n for n in range(math.ceil(fewest), most + 1) if width % (n * tile) == 0]
        if groups:
            return min(groups, key=lambda n: (abs(n - heads), -n))
    return as_heads


def with_switches(graph: Graph, groups: int | None = None, like_heads: bool = False) -> Graph:
    """The graph with every MLP site divided into switches: `groups`, or as many as `mlp_switches`
    says.

    InputError where an MLP cannot be divided into so many groups.
    """
    if groups is not None and groups < 1:
        raise InputError(f"mlp-groups must be at least 1, not {groups}")
    heads = {s.layer: _query_heads(graph, s) for s in graph.sites_of("heads")}
    usual = max(heads.values(), default=32)
    sites: Sequence[Site] = [
        replace(
            site,
            switches=groups or mlp_switches(site.lanes, heads.get(site.layer, usual), like_heads),
        )
        if site.kind == "mlp"
        else site
        for site in graph.sites
    ]
    for site in sites:
        if site.switches > site.lanes:
            raise InputError(f"{site.name} has {site.lanes} neurons, too few for {groups} groups")
    return graph.replacing(graph.operators, sites)


def _query_heads(graph: Graph, site: Site) -> int:
    """Attention heads (not KV groups) of a site's attention operator."""
    for operator in graph.operators:
        if operator.kind == "attention" and ("heads", site.name) in operator.narrowed_by:
            return operator.integer("heads")
    return site.lanes
