"""Planned language models in lm-eval (EleutherAI's harness).

    python -m planner.integrations.lm_harness --model planner \
        --model_args pretrained=FOLDER,budget=0.65 --tasks hellaswag --device cpu

`pretrained` and what else lm-eval's ``hf`` takes is as there; `budget`, `tokens`, `utilities` and
the like are for `planner.compile`. Every prompt is planned for as it comes.
"""

from __future__ import annotations

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import planner
from planner.integrations.harness_options import taken_out


@register_model("planner")
class PlannedLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model under a budget; the arguments are its own and planner's."""

    def __init__(self, **arguments: Any) -> None:
        options = taken_out(arguments)
        super().__init__(**arguments)
        planner.compile(self.model, **options)


if __name__ == "__main__":
    cli_evaluate()
