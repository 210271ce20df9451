"""What was measured is kept in a file, and measured again when something about it has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.files import write_text
from planner.progress import Say
from planner.training.trainer import last_checkpoint


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


@dataclass(frozen=True, eq=False)
class Bench:
    """What is trained and measured of one seed, when it is needed, and kept."""

    work: Path  # where models and results are kept
    seed: int  # of the training runs and of the test questions
    samples: int  # test questions
    overrides: tuple[str, ...]  # of every training configuration
    progress: Say  # told what comes next

    def say(self, what: str) -> None:
        """Tell what comes next of this seed."""
        self.progress(f"seed {self.seed}: {what}")

    def run_settings(self, folder: Path) -> list[str]:
        """Settings of a training run of this seed, which leaves its model in ``folder/model``."""
        return [
            f"output_dir={folder / 'run'}",
            f"export_dir={folder / 'model'}",
            f"seed={self.seed}",
        ]


def losses_logged(run: Path) -> list[dict[str, Any]]:
    """What a training run logged with its losses, from its last checkpoint."""
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    history = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]
