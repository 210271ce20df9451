"""Replicas of `planner serve --ray` while a load comes and goes.

    python benchmarks/scaling.py [--model tiny-llava] [--replicas 1-2] [--batch 4] [--clients 8]
                                 [--deadline-ms MS] [--seconds 60] [--ray local]

Clients keep one question each on its way for so many seconds, and go. Every change of the number
of replicas is printed with its time, until there are as few as before. With a deadline, what starts
replicas is that it is missed, where the clients are fewer than `--batch`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import urlopen

import openai
from PIL import Image, ImageDraw

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
def served(model: str, budgets: str, *more: str) -> Iterator[str]:
    """The address of a server, which is given these options besides."""
    command = [sys.executable, "-m", "planner", "serve", "-m", model, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--budgets", budgets, "--queue", "1000", *more],
        stderr=subprocess.PIPE,
        text=True,
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


async def ask(client: openai.AsyncOpenAI, model: str, question: int, **own: Any) -> Any:
    """One answer."""
    return await client.chat.completions.create(
        model=model, messages=ASKED[question], max_tokens=MOST_TOKENS, extra_body=own
    )


def replicas_at(base: str) -> int:
    with urlopen(f"{base.removesuffix('/v1')}/metrics") as answer:
        found = re.search(r"^planner:replicas ([\d.]+)$", answer.read().decode(), re.MULTILINE)
    return int(float(found[1])) if found else 0


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--replicas", default="1-2")
    parser.add_argument("--batch", default="4")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--deadline-ms", type=float)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--ray", default="local")
    given = parser.parse_args()
    own = {} if given.deadline_ms is None else {"deadline_ms": given.deadline_ms}
    options = ("--ray", given.ray, "--replicas", given.replicas, "--batch", given.batch)
    with served(given.model, "0.65,1", *options, "--utilities", "prior") as base:
        begun, answers, refused = time.monotonic(), 0, 0

        async def one(client: openai.AsyncOpenAI, seed: int) -> None:
            nonlocal answers, refused
            rng = random.Random(seed)
            while time.monotonic() - begun < given.seconds:
                try:
                    await ask(client, given.model, rng.randrange(len(ASKED)), **own)
                    answers += 1
                except openai.APIStatusError:
                    refused += 1
                    await asyncio.sleep(0.1)

        async def watch() -> None:
            fewest, count = await asyncio.to_thread(replicas_at, base), 0
            while count != fewest or time.monotonic() - begun < given.seconds:
                now = await asyncio.to_thread(replicas_at, base)
                if now != count:
                    count = now
                    print(f"{time.monotonic() - begun:6.1f} s  {count} replicas", flush=True)
                await asyncio.sleep(0.5)

        async with openai.AsyncOpenAI(base_url=base, api_key="-", max_retries=0) as client:
            await asyncio.gather(watch(), *(one(client, n) for n in range(given.clients)))
    print(f"{answers} answers, {refused} requests refused in {given.seconds:g} s")


if __name__ == "__main__":
    asyncio.run(main())
