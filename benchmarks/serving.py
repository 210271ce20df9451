"""`planner serve` under load: answers in time, with a ladder of plans and with each plan alone.

    python benchmarks/serving.py [--model tiny-llava] [--clients 200] [--seconds 120]
                                 [--deadline-ms 4000] [--budgets 0.5,0.65,0.85,1] [--json]

Every setting is a server of its own, in turn: all budgets, picked by deadline; then every budget
as the only one, 1 being the base model served the same way. As many clients as asked keep one
question each on its way, through OpenAI's own client. Before that, every question is asked alone:
an answer under load that is another than that, under the same plan, is counted as differing.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
from PIL import Image, ImageDraw

from planner.cli.console import print_json, print_records

QUESTIONS = ("how many red circles are there ?", "is there a blue square ?", "describe the picture")
PICTURES = 4
MOST_TOKENS = 16


def picture(seed: int) -> str:
    """Some circles, as a data URL."""
    rng, image = random.Random(seed), Image.new("RGB", (56, 56), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 4)):
        x, y = rng.randint(0, 40), rng.randint(0, 40)
        draw.ellipse((x, y, x + 14, y + 14), fill=rng.choice(("red", "green", "blue")))
    contents = io.BytesIO()
    image.save(contents, "PNG")
    return "data:image/png;base64," + base64.b64encode(contents.getvalue()).decode()


ASKED: list[Any] = [
    [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": picture(seed)}},
                {"type": "text", "text": text},
            ],
        }
    ]
    for seed in range(PICTURES)
    for text in QUESTIONS
]


@contextmanager
def served(model: str, budgets: str) -> Iterator[str]:
    """The address of a server."""
    command = [sys.executable, "-m", "planner", "serve", "-m", model, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--budgets", budgets, "--queue", "1000"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        said = ""
        for said in process.stderr:
            if "http://" in said:
                break
        else:
            sys.exit(f"the server did not start: {said}")
        yield said.rpartition(" ")[2].strip()
    finally:
        process.terminate()
        process.wait(60)


@dataclass
class Load:
    """What came of a load."""

    seconds: list[float] = field(default_factory=list)  # of answers
    in_time: int = 0
    refused: int = 0
    lost: int = 0
    differing: int = 0
    budgets: Counter[float] = field(default_factory=Counter)


async def ask(client: openai.AsyncOpenAI, model: str, question: int, **own: Any) -> Any:
    """One answer: (text, budget of its plan)."""
    answer = await client.chat.completions.create(
        model=model, messages=ASKED[question], max_tokens=MOST_TOKENS, extra_body=own
    )
    usage: Any = answer.usage
    return answer.choices[0].message.content, usage.plan["budget"]


async def press(
    base: str, model: str, budgets: Sequence[float], clients: int, seconds: float, deadline: float
) -> Load:
    """Load a server; the deadline is told only where there is a choice of plans."""
    load, own = Load(), {"deadline_ms": deadline * 1000} if len(budgets) > 1 else {}
    async with openai.AsyncOpenAI(base_url=base, api_key="-", max_retries=0, timeout=300) as client:
        alone = {
            (question, budget): (await ask(client, model, question, budget=budget))[0]
            for question in range(len(ASKED))
            for budget in budgets
        }
        ends = time.monotonic() + seconds

        async def one(seed: int) -> None:
            rng = random.Random(seed)
            while (begun := time.monotonic()) < ends:
                question = rng.randrange(len(ASKED))
                try:
                    text, budget = await ask(client, model, question, **own)
                except (openai.RateLimitError, openai.InternalServerError) as refusal:
                    load.refused += 1
                    await asyncio.sleep(float(refusal.response.headers.get("retry-after", 1)))
                    continue
                except openai.OpenAIError:
                    load.lost += 1
                    continue
                took = time.monotonic() - begun
                load.seconds.append(took)
                load.in_time += took <= deadline
                load.differing += text != alone[question, budget]
                load.budgets[budget] += 1

        await asyncio.gather(*(one(seed) for seed in range(clients)))
    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--deadline-ms", type=float, default=4000)
    parser.add_argument("--budgets", default="0.5,0.65,0.85,1")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    budgets = given.budgets.split(",")
    rows = []
    for setting in (given.budgets, *budgets):
        fractions = [float(budget) for budget in setting.split(",")]
        with served(given.model, setting) as base:
            load = asyncio.run(
                press(
                    base, given.model, fractions, given.clients, given.seconds,
                    given.deadline_ms / 1000,
                )
            )  # fmt: skip
        took = sorted(load.seconds) or [float("nan")]
        mean = sum(b * n for b, n in load.budgets.items()) / max(1, sum(load.budgets.values()))
        rows.append(
            {
                "budgets": setting,
                "answers_per_second": len(load.seconds) / given.seconds,
                "in_time_per_second": load.in_time / given.seconds,
                "median_seconds": took[len(took) // 2],
                "p99_seconds": took[int(0.99 * (len(took) - 1))],
                "refused": load.refused,
                "lost": load.lost,
                "differing": load.differing,
                "mean_budget": mean,
            }
        )
    if given.json:
        print_json({"rows": rows})
        return
    print_records(
        {
            "budgets": "{budgets}",
            "answers/s": "{answers_per_second:.1f}",
            "in time/s": "{in_time_per_second:.1f}",
            "median s": "{median_seconds:.2f}",
            "p99 s": "{p99_seconds:.2f}",
            "refused": "{refused}",
            "lost": "{lost}",
            "differing": "{differing}",
            "mean budget": "{mean_budget:.2f}",
        },
        rows,
    )


if __name__ == "__main__":
    main()
