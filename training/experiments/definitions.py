"""Which cells make which table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

BUDGETS = (1.0, 0.85, 0.6, 0.5)
PRUMERGE, FASTV = "prumerge+:ratio=0.125", "fastv:k=2,r=0.5"
# Half and a third of 49 image tokens: what looks at nothing is in every table.
DOWNSAMPLED = ("downsample:side=5", "downsample:side=4")
BASE = "tiny-llava"


@dataclass(frozen=True)
class Cell:
    """One measured accuracy."""

    method: str  # the row's name
    budget: float  # of the base model
    tokens: str = ""  # a token selector, "" for none
    config: str = ""  # file name of the training configuration; "" for the model as it is shipped
    overrides: tuple[str, ...] = ()  # of that configuration
    # How a trained model's switches are chosen: ``scheduler``, ``random``, ``depth`` or
    # ``threshold``; or, without training, ``base``, ``prior`` or ``calibrated``.
    rule: str = "scheduler"
    switches: str = ""  # of a static plan
    labels: int = 0  # on how many samples' labels the scheduler is trained before; 0 for none

    @property
    def key(self) -> str:
        """What tells it from other cells, as a file name."""
        parts = [self.method, self.tokens, f"{self.budget:g}"]
        return "_".join(p for p in parts if p).replace(" ", "-").replace(":", "-")


@dataclass(frozen=True)
class Table:
    """A table with cells in the order of its rows.

    With `learning`, the regret of plans and the losses of training belong to it.
    """

    title: str
    cells: Sequence[Cell]
    learning: bool = False


def _base() -> Iterator[Cell]:
    yield Cell(BASE, 1.0, rule="base")
    for tokens in DOWNSAMPLED:
        yield Cell(BASE, 1.0, tokens, rule="base")


def _table1() -> Iterator[Cell]:
    yield from _base()
    for tokens in ("", PRUMERGE, FASTV):
        if tokens:
            yield Cell(BASE, 1.0, tokens, rule="base")
        if tokens == PRUMERGE:
            # Features at the places and positions of their patches, not in the selector's order.
            yield Cell(BASE, 1.0, f"{PRUMERGE},positions=original", rule="base")
        for name in ("adallava-l", "adallava-h"):
            for budget in BUDGETS:
                yield Cell(name, budget, tokens, f"{name}.yaml")


def _baselines() -> Iterator[Cell]:
    yield from _base()
    # At 0.5 nothing of the upper half is on, and there is nothing to decide.
    for budget in (0.85, 0.6):
        for name in ("adallava-l", "adallava-h"):
            yield Cell(name, budget, "", f"{name}.yaml")
            for rule in ("random", "depth"):
                yield Cell(f"{name}, {rule} plans", budget, "", f"{name}.yaml", rule=rule)
        for rule in ("prior", "calibrated"):
            for switches in ("layers", "layers,heads,mlp"):
                method = f"static, {rule}, {switches.replace(',', ' ')}"
                yield Cell(method, budget, rule=rule, switches=switches)


def _table3() -> Iterator[Cell]:
    yield from _base()
    for budget in (0.95, 0.85, 0.75, 0.6):
        yield Cell("probabilistic", budget, "", "adallava-l.yaml")
        yield Cell(
            "deterministic",
            budget,
            "",
            "adallava-l.yaml",
            ("estimator=deterministic",),
            rule="threshold",
        )


def _warm_start() -> Iterator[Cell]:
    # Short runs: what labels can save is training.
    joint, taught = ("max_steps=150", "logging_steps=10"), "label_steps=100"
    methods: dict[str, tuple[tuple[str, ...], int]] = {
        "from scratch": (joint, 0),
        "warm start": ((*joint, taught), 512),
    }
    for method, (overrides, labels) in methods.items():
        # At 0.6 nothing of the upper half is on.
        for budget in (0.85, 0.65, 0.6):
            yield Cell(method, budget, "", "adallava-l.yaml", overrides, labels=labels)


TABLES: Mapping[str, Table] = {
    "table1": Table("Accuracy under budgets, with and without token selection", [*_table1()]),
    "baselines": Table("The scheduler against simpler ways to decide", [*_baselines()]),
    "table3": Table("Probabilistic against deterministic scheduling", [*_table3()]),
    "warm-start": Table("Labels before joint training", [*_warm_start()], learning=True),
}
