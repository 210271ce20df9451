"""What was measured is kept in a file, and measured again when something about it has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from planner.files import write_text
from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.loading import load_model
from planner.progress import Say
from planner.training.run_folders import INPUTS, contents_told
from planner.training.trainer import last_checkpoint

# Names of files end at 255 bytes; the rest of a longer label is told by its digest.
_LONGEST_LABEL = 200


def kept(path: Path, identity: Any) -> dict[str, Any] | None:
    """The result in a file; None where there is none of this identity (JSON)."""
    if not path.is_file():
        return None
    known = json.loads(path.read_text())
    return dict(known["result"]) if known["identity"] == identity else None


def kept_or_measured(
    path: Path, identity: Any, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result in a file, or a new one where there is none of the same identity."""
    known = kept(path, identity)
    if known is not None:
        return known
    result = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"identity": identity, "result": result}, indent=1) + "\n")
    return result


@dataclass(frozen=True)
class Loaded:
    """A model, and what experiments found out about it, for what comes next."""

    model: Any
    processor: Any
    graph: Graph
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Bench:
    """What is trained and measured of one seed, when it is needed, and kept."""

    work: Path  # where models and results are kept
    seed: int  # of the training runs and of the test questions
    samples: int  # test questions
    overrides: tuple[str, ...]  # of every training configuration
    progress: Say  # told what comes next
    _loaded: dict[str, Loaded] = field(default_factory=dict)

    @cached_property
    def changes(self) -> list[str]:
        """The overrides, told by what the files and folders that they name hold now."""
        pairs = [override.partition("=") for override in self.overrides]
        held = [contents_told(value) if name in INPUTS else value for name, _, value in pairs]
        return [
            override if found in (value, None) else f"{override}@{str(found)[:16]}"
            for override, (_, _, value), found in zip(self.overrides, pairs, held, strict=True)
        ]

    def say(self, what: str) -> None:
        """Tell what comes next of this seed."""
        self.progress(f"seed {self.seed}: {what}")

    def trained(self, what: str, label: str, marks: str, train: Callable[[list[str]], Any]) -> Path:
        """The folder of the model with a label, trained before or now; it has a file `marks`.

        `train` is given the settings of a training run of this seed.
        """
        folder = self._folder(label)
        if not self.has_trained(label, marks):
            self.say(f"training {what}")
            places = [f"output_dir={folder / 'run'}", f"export_dir={folder / 'model'}"]
            train([*places, f"seed={self.seed}"])
        return folder / "model"

    def has_trained(self, label: str, marks: str) -> bool:
        """Whether the model with a label was trained before."""
        return (self._folder(label) / "model" / marks).is_file()

    def _folder(self, label: str) -> Path:
        if len(label) > _LONGEST_LABEL:
            digest = hashlib.sha256(label.encode()).hexdigest()[:16]
            label = f"{label[:_LONGEST_LABEL]}_{digest}"
        return self.work / "models" / f"{label}_seed-{self.seed}"

    def load(self, name: str) -> Loaded:
        """A model; one at a time is held, since experiments go through models in order."""
        if name not in self._loaded:
            self._loaded.clear()
            model, processor, _ = load_model(name)
            self._loaded[name] = Loaded(model, processor, lower_model(model, "model"))
        return self._loaded[name]


B = TypeVar("B", bound=Bench)


@dataclass(frozen=True)
class Runs:
    """What an experiment is to measure: a bench for each seed."""

    name: str  # of the experiment
    work: Path
    seeds: Sequence[int]
    samples: int  # test questions of each
    overrides: Sequence[str]
    progress: Say
    # Of a comparison, what is measured if it is missing; empty for all.
    variants: Sequence[str] = ()
    budgets: Sequence[float] = ()
    page: Path | None = None  # the folder of results, which may have some already

    def benches(self, kind: type[B]) -> list[B]:
        """One of this kind for each seed."""
        same = self.samples, tuple(self.overrides), self.progress
        return [kind(self.work, seed, *same) for seed in self.seeds]

    @property
    def facts(self) -> dict[str, Any]:
        """What results say of how they came about."""
        flags = "".join(f" --set {override}" for override in self.overrides)
        seeds = ",".join(map(str, self.seeds))
        return {
            "experiment": self.name,
            "command": f"planner experiment {self.name} --seeds {seeds} "
            f"--samples {self.samples}{flags}",
            "seeds": list(self.seeds),
            "samples": self.samples,
        }


def losses_logged(run: Path) -> list[dict[str, Any]]:
    """What a training run logged with its losses, from its last checkpoint."""
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    history = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]
