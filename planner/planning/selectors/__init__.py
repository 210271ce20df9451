"""Token selectors as plans know them: names, arguments, how many tokens they leave, what they cost.

What users should know of each is in docs/selectors.md. `parse` reads a selector as users write it,
``fastv:k=2,r=0.5``, and ``str`` writes it. Nothing here imports torch; what a rule computes is
`planner.models.tokens.selectors`.

    arguments           methods with parameters as text
    selector            what is known of every selector
    attention_widths    features of the attention by which selectors rank tokens
    in_decoder          selectors that work in the decoder
    in_vision           selectors that work before the projector
    in_both             selectors that work inside the vision tower, and in the decoder
    text_guided         selectors that compare patches with the question, by a CLIP model
    eviction            policies of the KV cache
    trained_predictors  Dynamic-LLaVA: a selector and a policy of the KV cache
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.plan import TokenStage
from planner.planning.selectors.arguments import read_named
from planner.planning.selectors.eviction import H2O, AnswerPolicy, AnswerRule, KVPolicy, VoCo
from planner.planning.selectors.in_both import IVTP, IVTPTower
from planner.planning.selectors.in_decoder import (
    DART,
    DivPrune,
    FastV,
    Learned,
    PyramidDrop,
    Random,
    SparseVLM,
    Uniform,
)
from planner.planning.selectors.in_vision import (
    Downsample,
    FasterVLM,
    HiRED,
    PruMerge,
    PruMergePlus,
    VisionZip,
    VisPruner,
)
from planner.planning.selectors.selector import (
    DecoderSelector,
    Needs,
    PatchStage,
    Product,
    Selector,
    Sizes,
    TowerSelector,
    VisionSelector,
)
from planner.planning.selectors.text_guided import TRIM, CDPruner, TextGuided
from planner.planning.selectors.trained_predictors import (
    AnswerTokens,
    DynamicLLaVA,
    PredictorSettings,
)

__all__ = [
    "DART",
    "H2O",
    "IVTP",
    "KV_POLICIES",
    "SELECTORS",
    "TRIM",
    "AnswerPolicy",
    "AnswerRule",
    "AnswerTokens",
    "CDPruner",
    "DecoderSelector",
    "DivPrune",
    "Downsample",
    "DynamicLLaVA",
    "FastV",
    "FasterVLM",
    "HiRED",
    "IVTPTower",
    "KVPolicy",
    "Learned",
    "Needs",
    "PatchStage",
    "PredictorSettings",
    "Product",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "Random",
    "Selector",
    "Sizes",
    "SparseVLM",
    "TextGuided",
    "TowerSelector",
    "Uniform",
    "VisPruner",
    "VisionSelector",
    "VisionZip",
    "VoCo",
    "counted",
    "parse",
    "parse_kv_policy",
    "patch_stages",
    "scores_by_attention",
    "selector_of",
    "stages_of",
    "whole_selector",
]

SELECTORS: Mapping[str, type[DecoderSelector] | type[VisionSelector]] = {
    "fastv": FastV,
    "sparsevlm": SparseVLM,
    "pyramiddrop": PyramidDrop,
    "dart": DART,
    "divprune": DivPrune,
    "learned": Learned,
    "random": Random,
    "uniform": Uniform,
    "dynamic-llava": DynamicLLaVA,
    "prumerge": PruMerge,
    "prumerge+": PruMergePlus,
    "visionzip": VisionZip,
    "hired": HiRED,
    "trim": TRIM,
    "fastervlm": FasterVLM,
    "vispruner": VisPruner,
    "cdpruner": CDPruner,
    "downsample": Downsample,
    "ivtp": IVTP,
}

KV_POLICIES: Mapping[str, type[KVPolicy]] = {
    "h2o": H2O,
    "dynamic-llava": AnswerTokens,
    "answer": AnswerRule,
    "voco": VoCo,
}


def parse(text: str) -> DecoderSelector | VisionSelector:
    """Read a selector, for example ``fastv:k=2,r=0.5``; InputError says what is wrong."""
    name = text.strip().partition(":")[0]
    if name in KV_POLICIES and name not in SELECTORS:
        raise InputError(f"'{name}' is a policy of the KV cache: give it as --kv {text}.")
    return read_named(text, SELECTORS, "token selector")


def parse_kv_policy(text: str) -> KVPolicy:
    """Read a KV cache policy, for example ``h2o:heavy=0.25,recent=0.25``."""
    return read_named(text, KV_POLICIES, "KV cache policy")


def scores_by_attention(selector: str) -> bool:
    """Whether a selector, with or without its arguments, scores by one row of attention."""
    kind = SELECTORS.get(selector.partition(":")[0])
    return kind is not None and kind.scores_by_attention


def counted(
    selector: Selector, image_tokens: int, per_run: int = 0, tiles: tuple[int, int] = (1, 0)
) -> tuple[int, ...]:
    """Image tokens of one sample that a selector leaves at each of its layers, at most.

    `per_run` and `tiles`: as for `Selector.counts_of_sample`, whose errors it raises. InputError
    where the number depends on content and has no cap, so that no cost can be promised.
    """
    counts = selector.counts_of_sample(image_tokens, per_run, tiles)
    known = tuple(count for count in counts if count is not None)
    if len(known) < len(counts):
        raise InputError(
            f"how many tokens {selector} keeps depends on the image, and may be all of them, so no "
            f"cost below the base model's can be promised; give it a cap, such as "
            f"{selector.name}:max=0.25"
        )
    return known


def stages_of(
    text: str, image_tokens: int, per_run: int = 0, tiles: tuple[int, int] = (1, 0)
) -> tuple[TokenStage, ...]:
    """The token stages of a selector such as ``fastv:k=2,r=0.5``, or of "", on one sample's tokens.

    `per_run` and `tiles`: as for `counted`, whose errors it raises, and those of `parse`.
    """
    if not text:
        return ()
    selector = parse(text)
    counts = zip(selector.layers, counted(selector, image_tokens, per_run, tiles), strict=True)
    return tuple(TokenStage(layer, n, image_tokens, str(selector)) for layer, n in counts)


def whole_selector(stage: TokenStage) -> DecoderSelector | VisionSelector:
    """The selector that a plan names, with all that it does at other stages.

    With arguments, ``fastv:k=2,r=0.5``, it is taken as it is; ``fastv`` keeps as many as the stage
    says.
    """
    known = SELECTORS.get(stage.selector)
    if known is not None and issubclass(known, DecoderSelector):
        return known.at(stage.layer, stage.keep, stage.of)
    return parse(stage.selector)


def selector_of(stage: TokenStage) -> DecoderSelector | VisionSelector:
    """What works at a stage of a plan: the selector that it names, or its part in the tower."""
    selector = whole_selector(stage).at_layer(stage.layer)
    assert isinstance(selector, DecoderSelector | VisionSelector)
    if isinstance(selector, VisionSelector) and stage.layer:
        raise InputError(
            f"the plan runs {stage.selector} at layer {stage.layer}, but it works before layer 0"
        )
    return selector


def patch_stages(stages: Iterable[TokenStage], graph: Graph) -> tuple[PatchStage, ...]:
    """Where token stages of a plan drop patches inside the vision tower of a graph.

    InputError where the one that would cannot.
    """
    for stage in stages:
        part = None if stage.layer else whole_selector(stage).tower_part
        if part is not None:
            return part.stages_in(graph)
    return ()
