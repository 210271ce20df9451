"""Rules that pick image tokens, one small file per method, behind one interface.

| selector  | works             | scores by                                 | paper            |
|-----------|-------------------|-------------------------------------------|------------------|
| fastv     | before layer k    | last query's attention, layer k - 1       | arXiv 2403.06764 |
| sparsevlm | after some layers | attention of rating text, hidden states   | arXiv 2410.04417 |
| random    | before layer k    | nothing                                   |                  |
| uniform   | before layer k    | nothing                                   |                  |
| prumerge  | before projector  | CLS attention and keys, last layer        | arXiv 2403.15388 |
| prumerge+ | before projector  | CLS attention and keys, last layer        | arXiv 2403.15388 |
| visionzip | before projector  | CLS attention and keys, second last layer | arXiv 2412.04467 |
| hired     | before projector  | CLS attention, first and second last layer| arXiv 2408.10945 |
| trim      | before projector  | CLIP's patch and prompt embeddings        | arXiv 2409.10994 |

And one policy that evicts from the KV cache instead: h2o, by attention received per head (arXiv
2306.14048). All of them are rules, none is trained; some were also published with a model
fine-tuned under the rule (prumerge, prumerge+, visionzip).

In: tensors that an executor took from a stock model. Out: `DecoderSelection` or
`VisionSelection`. `parse("fastv:k=2,r=0.5")` reads a selector as users write it, ``str`` writes
it. A new method is its own file, a line in the registry below and its twin in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.models.selectors.arguments import read_named
from planner.models.selectors.base import (
    DecoderInputs,
    DecoderSelection,
    DecoderSelector,
    Needs,
    Selector,
    Stage,
    TowerAttention,
    VisionInputs,
    VisionSelection,
    VisionSelector,
)
from planner.models.selectors.fastv import FastV
from planner.models.selectors.h2o import H2O, HeavyHitters
from planner.models.selectors.hired import HiRED
from planner.models.selectors.prumerge import PruMerge, PruMergePlus
from planner.models.selectors.random import Random
from planner.models.selectors.sparsevlm import SparseVLM
from planner.models.selectors.trim import TRIM
from planner.models.selectors.uniform import Uniform
from planner.models.selectors.visionzip import VisionZip

__all__ = [
    "H2O",
    "KV_POLICIES",
    "SELECTORS",
    "TRIM",
    "DecoderInputs",
    "DecoderSelection",
    "DecoderSelector",
    "FastV",
    "HeavyHitters",
    "HiRED",
    "Needs",
    "PruMerge",
    "PruMergePlus",
    "Random",
    "Selector",
    "SparseVLM",
    "Stage",
    "TowerAttention",
    "Uniform",
    "VisionInputs",
    "VisionSelection",
    "VisionSelector",
    "VisionZip",
    "parse",
    "parse_kv_policy",
]

SELECTORS: Mapping[str, type[Selector]] = {
    "fastv": FastV,
    "sparsevlm": SparseVLM,
    "random": Random,
    "uniform": Uniform,
    "prumerge": PruMerge,
    "prumerge+": PruMergePlus,
    "visionzip": VisionZip,
    "hired": HiRED,
    "trim": TRIM,
}

KV_POLICIES: Mapping[str, type[H2O]] = {"h2o": H2O}


def parse(text: str) -> Selector:
    """Read a selector, for example ``fastv:k=2,r=0.5``; InputError says what is wrong."""
    return read_named(text, SELECTORS, "token selector")


def parse_kv_policy(text: str) -> H2O:
    """Read a KV cache policy, for example ``h2o:heavy=0.25,recent=0.25``."""
    return read_named(text, KV_POLICIES, "KV cache policy")
