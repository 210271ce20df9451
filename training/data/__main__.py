"""Write rendered scenes as LLaVA conversation JSON with images.

python -m planner.training.data --split train --scenes 1000 --output build/scenes [--seed 0]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from planner.files import write_text
from planner.training.data import (
    SPLITS,
    Conversation,
    SceneConversations,
    SceneQuestions,
    write_llava,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write rendered scenes in LLaVA's form.")
    parser.add_argument("--split", default="train", choices=sorted(SPLITS))
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-question", action="store_true", help="the evaluation's form")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.scenes < 1:
        parser.error("--scenes must be at least 1")
    kind = SceneQuestions if options.one_question else SceneConversations
    scenes = kind(options.split, options.scenes, options.seed)
    print(write_llava((scenes[i] for i in range(len(scenes))), options.output))
    if options.one_question:
        lines = [_prompt(scenes[i]) for i in range(len(scenes))]
        write_text(Path(options.output) / "prompts.jsonl", "".join(lines))


def _prompt(scene: Conversation) -> str:
    """A line of what ``planner calibrate-utilities --prompts`` reads; the model answers itself."""
    return json.dumps({"image": f"{scene.id}.png", "prompt": scene.turns[0].question}) + "\n"


if __name__ == "__main__":
    main()
