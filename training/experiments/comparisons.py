"""Which controllers are compared.

exp1: image tokens, adaptive against selectors. exp2: one axis, two or all three. exp3: how a
controller learns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt


@dataclass(frozen=True)
class Variant:
    """One line of a plot."""

    name: str  # for users
    settings: tuple[str, ...] = ()  # of the training configuration
    # Name of the variant whose model and controller this one goes on from; "" for the base model.
    start: str = ""
    # ``controller``, or what takes its place on the same weights: ``static``, the best plan for all
    # questions, ``random`` or ``oracle``; ``tuned`` is the static plan on weights trained for it,
    # ``tuned controller`` a controller trained at that budget alone, and ``tuned from static`` one
    # that begins with the static plan. Or a part
    # of the controller: ``same switches`` has one order of switches for all questions, ``grid`` a
    # grid of image tokens.
    plans: str = "controller"
    # The text of a token selector that keeps n of N tokens; it runs on the base model.
    selector: Callable[[int, int], str] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Comparison:
    """An experiment: its variants, and which ones the others are held against."""

    title: str
    budgets: tuple[float, ...]
    variants: tuple[Variant, ...]
    against: tuple[str, ...]


def _switches(text: str) -> tuple[str, ...]:
    return (f"switches={text}",)


def _fewer_switches(text: str) -> tuple[str, ...]:
    """Of a variant that cannot keep to the others' least budget: it learns down to its own."""
    return (*_switches(text), "least_budget=0")


_ALL = "tokens,layers,heads,mlp:groups=8"
# As many steps as the six plans of "static, tuned" take together.
_LONG_RUN = Variant("all, 900 steps", (*_switches(_ALL), "max_steps=900"))
_NOISELESS = "method=gumbel:temperature=5,noise=0"
_ALL_NOISELESS = (*_switches(_ALL), _NOISELESS)
_FROM_A_SPREAD = (*_switches(f"{_ALL},scorer=spread"), _NOISELESS)
# Faster, its weights leave the plan before they have seen what is better.
_FROM_STATIC = (*_FROM_A_SPREAD, "scheduler_learning_rate=1e-4")
# The axes on which every estimator works.
_ADDITIVE = "tokens,heads,mlp:groups=8"


def _method(method: str, *others: str) -> Variant:
    settings = (*_switches(_ADDITIVE), f"method={method}", "freeze_model=true", *others)
    return Variant(method.partition(":")[0], settings, "elastic")


# A step of a policy takes about seven thirds of the passes of an estimator's.
_FEWER = "max_steps=65"

COMPARISONS: Mapping[str, Comparison] = {
    "exp1": Comparison(
        "Image tokens: an adaptive controller against selectors",
        (0.8, 0.65, 0.55, 0.45, 0.35),
        (
            Variant("adaptive", _fewer_switches("tokens")),
            Variant("uniform, trained", _fewer_switches("tokens:scorer=uniform")),
            Variant("random, trained", _fewer_switches("tokens:scorer=random")),
            Variant("prumerge", selector=lambda n, of: f"prumerge:max={n / of}"),
            Variant("prumerge+", selector=lambda n, of: f"prumerge+:ratio={n / of}"),
            Variant("fastv", selector=lambda n, of: f"fastv:k=2,r={1 - n / of}"),
            Variant("visionzip", selector=lambda n, of: _visionzip(n)),
            Variant("uniform", selector=lambda n, of: f"uniform:keep={n}"),
            Variant("random", selector=lambda n, of: f"random:keep={n}"),
            Variant("downsample", selector=lambda n, of: f"downsample:side={isqrt(n)}"),
        ),
        ("adaptive",),
    ),
    "exp2": Comparison(
        "One axis, two or all three",
        (0.8, 0.65, 0.55, 0.45, 0.35, 0.25, 0.2, 0.175, 0.15),
        (
            Variant("all", _switches(_ALL)),
            _LONG_RUN,
            Variant("static", _switches(_ALL), plans="static"),
            Variant("random", _switches(_ALL), plans="random"),
            Variant("oracle", _switches(_ALL), plans="oracle"),
            Variant("all, same switches", _switches(_ALL), plans="same switches"),
            Variant("all, tokens on a grid", _switches(_ALL), plans="grid"),
            Variant("tokens", _fewer_switches("tokens")),
            Variant("depth+width", _fewer_switches("tokens,layers,heads,mlp:groups=8,scorer=all")),
            Variant("width", _fewer_switches("tokens,heads,mlp:groups=8,scorer=all")),
            Variant("depth", _fewer_switches("tokens,layers:scorer=all")),
            Variant("static, tuned", _switches(_ALL), plans="tuned"),
            Variant("all, tuned", _switches(_ALL), plans="tuned controller"),
            # Both know what *all* has learned: a static plan is chosen on its weights. Without
            # noise the weights see the plans that will run, as those of a static plan do.
            Variant("static, tuned from all", _switches(_ALL), "all", "tuned"),
            Variant("all, tuned without noise", _ALL_NOISELESS, "all", "tuned controller"),
            Variant("static, 900 steps", _LONG_RUN.settings, plans="static"),
            Variant("static, tuned from 900 steps", _switches(_ALL), _LONG_RUN.name, "tuned"),
            Variant(
                "all, tuned from 900 steps", _ALL_NOISELESS, _LONG_RUN.name, "tuned controller"
            ),
            # As many steps for one plan alone.
            Variant("static, 1050 steps", (*_switches(_ALL), "max_steps=1050"), plans="tuned"),
            # It begins with image tokens like those that a static plan keeps; or with all of one.
            Variant("all, tuned from a spread", _FROM_A_SPREAD, plans="tuned controller"),
            Variant("all, tuned from static", _FROM_STATIC, plans="tuned from static"),
        ),
        ("all", "all, tuned from 900 steps"),
    ),
    "exp3": Comparison(
        "How a controller learns, on one elastic model",
        (0.65, 0.45, 0.3),
        (
            _method("gumbel:temperature=5"),
            _method("simple"),
            _method("imitation", _FEWER),
            _method("reinforce", _FEWER),
            _method("grpo", _FEWER),
            _method("ppo", _FEWER),
            Variant("elastic", _switches(_ADDITIVE)),
            Variant("random", _switches(_ADDITIVE), plans="random"),
        ),
        ("gumbel",),
    ),
}


def _visionzip(tokens: int) -> str:
    """In the paper's proportion: 54 dominant tokens of 64, the others contextual."""
    contextual = max(0, round(tokens * 10 / 64))
    return f"visionzip:dominant={tokens - contextual},contextual={contextual}"
