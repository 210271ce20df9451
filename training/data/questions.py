"""Questions about a scene, with answers derived from it: six families after the usual benchmarks.

existence (POPE: random and adversarial negatives), attribute (VQAv2, GQA), count, spatial (GQA),
text (TextVQA) and describe (a long answer, as in LLaVA-Bench). Every family's answers are balanced
as far as the scene allows, so that guessing pays little.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.ir.errors import InputError
from planner.training.data.scenes import COLORS, SHAPES, SIZES, Scene, SceneObject

DESCRIBE_AT_LEAST = 4  # objects, which makes a description of 50 tokens or more


@dataclass(frozen=True)
class Turn:
    """A question (without the image tag) and its answer; `kind` tells a family's variants apart."""

    question: str
    answer: str
    family: str | None = None
    kind: str | None = None


def ask(scene: Scene, family: str, rng: random.Random) -> Turn | None:
    """A random question of a family, or None where the scene gives no occasion for one."""
    return _ASK[family](scene, rng)


def _existence(scene: Scene, rng: random.Random) -> Turn | None:
    present = {(o.color, o.shape) for o in scene.objects}
    colors, shapes = ({o.color for o in scene.objects}, {o.shape for o in scene.objects})
    absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
    # Adversarial: both words fit something in the picture, or one does where no such pair is left.
    close = [(c, s) for c, s in absent if c in colors and s in shapes]
    close = close or [(c, s) for c, s in absent if c in colors or s in shapes]
    kind, pool = rng.choice(
        [
            ("positive", sorted(present)),
            ("positive", sorted(present)),
            ("random", absent),
            ("adversarial", close),
        ]
    )
    color, shape = rng.choice(pool)
    answer = "yes" if kind == "positive" else "no"
    return Turn(f"Is there a {color} {shape}?", answer, "existence", kind)


def _attribute(scene: Scene, rng: random.Random) -> Turn | None:
    kind = rng.choice(["color", "shape", "size"])
    found = []
    for o in scene.objects:
        found.append((f"the object in the {o.place}", o))
        # A phrase may name anything but what is asked for, and must fit one object only.
        phrases: dict[str, tuple[str, ...]]
        if kind == "color":
            phrases = {f"the {o.shape}": ("shape",), f"the {o.size} {o.shape}": ("size", "shape")}
        elif kind == "shape":
            phrases = {
                f"the {o.color} object": ("color",),
                f"the {o.size} {o.color} object": ("size", "color"),
            }
        else:
            phrases = {f"the {o.color} {o.shape}": ("color", "shape")}
        found += [(phrase, o) for phrase, keys in phrases.items() if _is_only(scene, o, keys)]
    phrase, owner = rng.choice(found)
    return Turn(f"What {kind} is {phrase}?", str(getattr(owner, kind)), "attribute", kind)


def _count(scene: Scene, rng: random.Random) -> Turn | None:
    phrases: dict[int, list[tuple[str, str]]] = {len(scene.objects): [("all", "objects")]}
    for kind, values in (("color", COLORS), ("size", SIZES), ("shape", SHAPES)):
        for value in values:
            number = sum(getattr(o, kind) == value for o in scene.objects)
            phrase = _plural(value) if kind == "shape" else f"{value} objects"
            phrases.setdefault(number, []).append((kind, phrase))
    number = rng.choice(sorted(phrases))  # every number that some phrase attains is equally likely
    kind, phrase = rng.choice(phrases[number])
    return Turn(f"How many {phrase} are there?", str(number), "count", kind)


def _spatial(scene: Scene, rng: random.Random) -> Turn | None:
    unique = [o for o in scene.objects if _is_only(scene, o, ("color", "shape"))]
    pairs = [
        (a, b, axis)
        for a in unique
        for b in unique
        for axis in ("row", "column")
        if getattr(a, axis) != getattr(b, axis)
    ]
    if pairs and rng.random() < 0.6:
        a, b, axis = rng.choice(pairs)
        before, after = ("above", "below") if axis == "row" else ("left of", "right of")
        is_before = getattr(a, axis) < getattr(b, axis)
        truth = rng.random() < 0.5
        relation = before if is_before == truth else after
        question = f"Is the {a.color} {a.shape} {relation} the {b.color} {b.shape}?"
        return Turn(question, "yes" if truth else "no", "spatial", "relation")
    if not unique:
        return None
    thing = rng.choice(unique)
    return Turn(f"Where is the {thing.color} {thing.shape}?", thing.place, "spatial", "place")


def _text(scene: Scene, rng: random.Random) -> Turn | None:
    if scene.text is None:
        return None
    kind = "number" if scene.text.isdigit() else "word"
    return Turn(f"What {kind} is written in the image?", scene.text, "text", kind)


def _describe(scene: Scene, rng: random.Random) -> Turn | None:
    if len(scene.objects) < DESCRIBE_AT_LEAST:
        return None
    sentences = [f"the image shows {len(scene.objects)} objects."]
    sentences += [
        f"there is a {o.size} {o.color} {o.shape} in the {o.place}." for o in scene.objects
    ]
    if scene.text is not None:
        sentences.append(f"the text says {scene.text}.")
    return Turn("Describe the image.", " ".join(sentences), "describe", "describe")


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _is_only(scene: Scene, thing: SceneObject, keys: Sequence[str]) -> bool:
    """Whether the named attributes tell an object from all others."""
    return sum(all(getattr(o, k) == getattr(thing, k) for k in keys) for o in scene.objects) == 1


_ASK: dict[str, Callable[[Scene, random.Random], Turn | None]] = {
    "existence": _existence,
    "attribute": _attribute,
    "count": _count,
    "spatial": _spatial,
    "text": _text,
    "describe": _describe,
}
FAMILIES = tuple(_ASK)


def families_of(text: str | None) -> tuple[str, ...]:
    """Families separated by commas, all for None; InputError where one is unknown or told twice."""
    names = FAMILIES if text is None else tuple(name.strip() for name in text.split(","))
    for number, name in enumerate(names):
        if name not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise InputError(f"there is no family of questions '{name:.80}': choose from {known}")
        if name in names[:number]:
            raise InputError(f"the family '{name}' is named twice")
    return names
