"""What a controller decides for different questions: by family, and in pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from textwrap import wrap
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planner.training.data import Conversation, SceneQuestions, Turn
from planner.training.experiments.comparisons import Comparison
from planner.training.experiments.controllers import FAMILIES, Measuring
from planner.training.experiments.forced_plans import Batches, Forced, packed
from planner.training.experiments.results_page import figure_as_svg

# Where plans differ most: all axes have room.
BUDGET = 0.35


def plan_facts(bench: Measuring, comparison: Comparison) -> dict[str, Any]:
    """Of the controller that others are held against, on the test questions of one seed.

    `families`: by family the image tokens kept, what is on of layers, heads and MLP groups that may
    be switched, and in which share of all switches two of its questions' plans differ, and one of
    its and one of another family's. `examples`: a question of each.
    """
    variant = next(v for v in comparison.variants if v.name == comparison.against[0])
    folder = bench.variant_trained(comparison, variant)
    forced, processor = bench.forced(folder, BUDGET), bench.load(str(folder)).processor
    rows = forced.answers(bench.batches("test", bench.samples, processor)).rows
    questions = bench.questions("test", bench.samples)
    return {
        "budget": BUDGET,
        "seed": bench.seed,
        "samples": bench.samples,
        "switches": list(forced.layout.switch_names),
        "families": _by_family(rows, forced.layout.switch_names),
        "examples": [
            {"index": index, **_example(forced, packed(processor, [questions[index]]))}
            for index in range(len(FAMILIES))
        ],
    }


def _by_family(rows: Tensor, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of decisions (questions, 1 + switches), whose families take turns."""
    taken = rows[:, 1:].double()
    axes = {
        axis: [column for column, name in enumerate(names) if name.startswith(start)]
        for axis, start in (("layers", "layer."), ("heads", "heads."), ("mlp", "mlp."))
    }
    shares = torch.stack([taken[index :: len(FAMILIES)].mean(0) for index in range(len(FAMILIES))])
    # By how often each switch is on, the odds that it differs between two questions.
    differ = (shares[:, None] * (1 - shares[None]) + (1 - shares[:, None]) * shares[None]).mean(-1)
    found = []
    for index, family in enumerate(FAMILIES):
        tokens = rows[index :: len(FAMILIES), 0].double()
        others = [other for other in range(len(FAMILIES)) if other != index]
        found.append(
            {
                "family": family,
                "image_tokens": float(tokens.mean()),
                "image_tokens_spread": float(tokens.std()),
                **{axis: float(shares[index, columns].mean()) for axis, columns in axes.items()},
                "within": float(differ[index, index]),
                "between": float(differ[index, others].mean()),
            }
        )
    return found


def _example(forced: Forced, batches: Batches) -> dict[str, Any]:
    """Of one question: its decision, the image tokens kept, and the attention of its token."""
    scheduled = forced.scheduled
    weights: list[Tensor] = []
    model: Any = scheduled.model
    blocks = [layer.self_attn for layer in model.get_decoder().layers]
    block = blocks[forced.layout.first - 1]
    handle = block.register_forward_hook(lambda _, args, output: weights.append(output[1]))
    try:
        for _ in forced.read(batches, output_attentions=True):
            assert scheduled.scores is not None
            assert scheduled.chosen is not None
            assert scheduled.at is not None
            image = scheduled.scores.image[0]
            # Mean over heads, of the row of the latency token; the image stands before it.
            attended = weights[0][0, :, int(scheduled.at), : len(image)].mean(0)[image]
            return {
                "decision": scheduled.decisions.pop()[0].tolist(),
                "kept": scheduled.chosen.keep[0][image].nonzero().flatten().tolist(),
                "attention": [round(float(weight), 4) for weight in attended],
            }
    finally:
        handle.remove()
    raise AssertionError("there was no question")


def plan_picture(facts: Mapping[str, Any]) -> bytes:
    """The examples of `plan_facts` side by side; SVG."""
    questions = SceneQuestions("test", facts["samples"], facts["seed"], FAMILIES)
    with figure_as_svg((9, 5.6), font_size=7) as (figure, drawn):
        axes = figure.subplots(3, len(facts["examples"]))
        for column, example in zip(axes.T, facts["examples"], strict=True):
            turn, picture = _asked(questions[example["index"]])
            column[0].imshow(_faded(picture, example["kept"], len(example["attention"])))
            column[0].set_title("\n".join([*wrap(turn.question, 26), turn.answer]))
            side = isqrt(len(example["attention"]))
            attention = np.array(example["attention"]).reshape(side, side)
            column[1].imshow(attention, cmap="magma", vmin=0)
            switched = _switched(example["decision"][1:], facts["switches"])
            column[2].imshow(switched, cmap="Greys", vmin=0, vmax=1, aspect="auto")
            for axis in column:
                axis.set_xticks([])
                axis.set_yticks([])
        labels = ("tokens kept", "latency token's attention", "layers: heads, MLP groups")
        for axis, label in zip(axes[:, 0], labels, strict=True):
            axis.set_ylabel(label)
    return drawn.getvalue()


def _asked(question: Conversation) -> tuple[Turn, npt.NDArray[np.float64]]:
    """What is asked, and its picture, (height, width, 3), from 0 to 1."""
    assert question.image is not None
    return question.turns[0], np.asarray(question.image.convert("RGB")) / 255


def _faded(
    picture: npt.NDArray[np.float64], kept: Sequence[int], patches: int
) -> npt.NDArray[np.float64]:
    """A picture whose patches that were dropped are nearly white."""
    shown = np.isin(np.arange(patches), kept).reshape(isqrt(patches), -1)
    size = picture.shape[0] // len(shown)
    mask = shown.repeat(size, 0).repeat(size, 1)[..., None]
    return np.where(mask, picture, 1 - 0.15 * (1 - picture))


def _switched(taken: Sequence[int], names: Sequence[str]) -> npt.NDArray[np.float64]:
    """What runs, a row a layer: its heads, then its MLP groups."""
    on = dict(zip(names, taken, strict=True))
    layers = sorted({int(re.findall(r"\d+", name)[0]) for name in names})
    rows = []
    for layer in layers:
        runs = on.get(f"layer.{layer}", 1)
        sites = [
            [0.9 * on[name] * runs for name in names if name.startswith(f"{kind}.{layer}[")]
            for kind in ("heads", "mlp")
        ]
        # A light column between the two.
        rows.append([*sites[0], 0.2, *sites[1]])
    return np.array(rows)
