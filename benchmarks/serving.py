"""`planner serve` under load: answers that are right and in time, beside each plan alone.

    python benchmarks/serving.py --output FILE [--model tiny-llava] [--switches layers]
        [--budgets 0.5,0.7,1] [--seconds 15] [--settings '1;0.5,0.7,1']
        [--clients 32] [--closed-seconds 8]

Every setting is a server of its own, in turn: the base model (budget 1), every other budget as the
only one, all budgets, picked by deadline, and `transformers serve` on the same model. Each is asked
questions about scenes over HTTP, in two ways. *Closed*: `--clients` have one question each on its
way. *Open*: requests come at random (Poisson), in bursts, at 1.3 times the rate that the base model
serves closed, whatever has been answered; each has a deadline of 8 or 32 times what the base model
takes for one alone. What is refused, late or wrong counts for nothing. Every planner server
is told the deadlines.

`--output` keeps what was measured: settings that are in the file are not measured again. Answers
under load are those of the same question alone, under the same plan, and none is lost, else nothing
is reported. Two hundred clients for two minutes, and nothing else:

    python benchmarks/serving.py --output FILE --settings 0.5,0.7,1 --clients 200 \\
        --closed-seconds 120 --seconds 0
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from planner.cli.console import print_records
from planner.documents import read_json
from planner.files import write_text
from planner.planning.catalog import find_model
from planner.training.data import Conversation, SceneQuestions
from planner.training.evaluate import score

FAMILIES = ("existence", "attribute", "count", "spatial")
QUESTIONS, MOST_TOKENS, POOLS = 64, 4, 50
# Of what the base model serves closed; the share of it in calm seconds and in bursts.
OVERLOAD, CALM, BURST = 1.3, 0.5, 2.0
# Of what the base model takes for one question alone; equally often.
DEADLINES = (8, 32)


@contextmanager
def served(command: Sequence[str], port: int) -> Iterator[str]:
    """The address of a server that runs on one thread, once it answers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=nowhere, stderr=nowhere) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            while True:
                if process.poll() is not None:
                    sys.exit(f"{' '.join(command)}: the server did not start")
                try:
                    httpx.get(f"{address}/health").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.2)
            yield f"{address}/v1/chat/completions"
        finally:
            process.terminate()
            process.wait(60)


def command_of(setting: str, model: str, switches: str, port: int) -> list[str]:
    """What starts a setting's server."""
    if setting == "transformers":
        folder = str(find_model(model).folder)
        program = str(Path(sys.executable).with_name("transformers"))
        own = ["--device", "cpu", "--dtype", "float32", "--log-level", "error"]
        return [program, "serve", folder, "--port", str(port), *own]
    serve = [sys.executable, "-m", "planner", "serve", "-m", model, "--port", str(port)]
    return [*serve, "--budgets", setting, "--switches", switches, "--queue", "1000"]


def body_of(sample: Conversation, model: str) -> dict[str, Any]:
    """A question as OpenAI's clients send it."""
    contents = io.BytesIO()
    assert sample.image is not None
    sample.image.save(contents, "PNG")
    url = "data:image/png;base64," + base64.b64encode(contents.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": sample.turns[0].question},
    ]
    messages = [{"role": "user", "content": parts}]
    return {"model": model, "messages": messages, "max_tokens": MOST_TOKENS, "temperature": 0}


@dataclass
class Load:
    """What came of some requests."""

    seconds: list[float] = field(default_factory=list)  # of answers
    in_time: int = 0
    right: float = 0.0
    hits: float = 0.0  # in time and right
    refused: int = 0
    lost: int = 0
    differing: int = 0

    def figures(self, seconds: float) -> dict[str, float]:
        """For the table."""
        asked = len(self.seconds) + self.refused + self.lost
        return {
            "asked": asked,
            "answers_per_second": len(self.seconds) / seconds,
            "goodput": self.hits / seconds,
            "kept": self.in_time / max(asked, 1),
            "accuracy": self.right / max(len(self.seconds), 1),
            "median_seconds": median(self.seconds) if self.seconds else float("nan"),
            "refused": self.refused,
            "lost": self.lost,
            "differing": self.differing,
        }


class Client:
    """Asks a server; `budgets` are those that it has, none for a server that knows no plans.

    Questions take turns with `pools`: a pool looks through all of its connections every time.
    """

    def __init__(
        self, pools: Sequence[httpx.AsyncClient], url: str, model: str, budgets: Sequence[float]
    ):
        self._pools, self._url, self._budgets = itertools.cycle(pools), url, budgets
        self.samples = list(SceneQuestions("test", QUESTIONS, families=FAMILIES))
        self._bodies = [body_of(sample, model) for sample in self.samples]
        self.alone: dict[tuple[int, float], str] = {}

    async def learn(self) -> float:
        """Ask every question alone, under every plan; median seconds under the dearest."""
        times: list[float] = []
        for budget in self._budgets or [1.0]:
            times = []
            for number in range(QUESTIONS):
                begun = time.monotonic()
                own = {"budget": budget} if self._budgets else {}
                self.alone[number, budget] = (await self._ask(number, own))[0]
                times.append(time.monotonic() - begun)
        return median(times)

    async def ask(self, load: Load, number: int, deadline: float) -> None:
        """One question under load."""
        begun = time.monotonic()
        own = {"deadline_ms": 1000 * deadline} if self._budgets else {}
        try:
            text, budget = await self._ask(number, own)
        except httpx.HTTPStatusError as error:
            is_refusal = error.response.status_code in (429, 503)
            load.refused += is_refusal
            load.lost += not is_refusal
            if is_refusal:  # of clients that wait for an answer; others come anyway
                await asyncio.sleep(float(error.response.headers.get("retry-after", 1)))
            return
        except httpx.HTTPError:
            load.lost += 1
            return
        took = time.monotonic() - begun
        right = score(self.samples[number].turns[0], text)
        load.seconds.append(took)
        load.in_time += took <= deadline
        load.right += right
        load.hits += right * (took <= deadline)
        load.differing += text != self.alone[number, budget]

    async def _ask(self, number: int, own: dict[str, Any]) -> tuple[str, float]:
        http = next(self._pools)
        answer = await http.post(self._url, json={**self._bodies[number], **own})
        said = answer.raise_for_status().json()
        plan = said["usage"].get("plan") or {"budget": 1.0}
        return (said["choices"][0]["message"]["content"] or "").strip(), plan["budget"]


async def closed(client: Client, clients: int, seconds: float, deadlines: Sequence[float]) -> Load:
    """Some clients, each with one question on its way."""
    load, ends = Load(), time.monotonic() + seconds

    async def one(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < ends:
            await client.ask(load, rng.randrange(QUESTIONS), rng.choice(deadlines))

    await asyncio.gather(*(one(seed) for seed in range(clients)))
    return load


async def opened(client: Client, seconds: float, rate: float, deadlines: Sequence[float]) -> Load:
    """Requests that come by themselves, every third second in a burst."""
    load, rng, tasks = Load(), random.Random(0), []
    begun, due = time.monotonic(), 0.0
    while due < seconds:
        due += rng.expovariate(rate * (BURST if int(due) % 3 == 2 else CALM))
        await asyncio.sleep(max(0.0, begun + due - time.monotonic()))
        asked = client.ask(load, rng.randrange(QUESTIONS), rng.choice(deadlines))
        tasks.append(asyncio.create_task(asked))
    await asyncio.gather(*tasks)
    return load


async def measure(
    url: str,
    model: str,
    budgets: Sequence[float],
    given: argparse.Namespace,
    base: dict[str, Any] | None,
) -> dict[str, Any]:
    """One setting; `base` is what the base model came to, None for itself."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with AsyncExitStack() as stack:
        made = [httpx.AsyncClient(limits=limits, timeout=120, verify=False) for _ in range(POOLS)]
        pools = [await stack.enter_async_context(http) for http in made]
        client = Client(pools, url, model, budgets)
        alone = await client.learn()
        deadlines = [n * (base["alone_seconds"] if base else alone) for n in DEADLINES]
        begun = time.monotonic()
        together = await closed(client, given.clients, given.closed_seconds, deadlines)
        figures = together.figures(time.monotonic() - begun)
        found: dict[str, Any] = {"alone_seconds": alone, "deadlines": deadlines, "closed": figures}
        if not given.seconds:
            return found
        rate = OVERLOAD * (base or found)["closed"]["answers_per_second"]
        load = await opened(client, given.seconds, rate, deadlines)
    return {**found, "rate": rate, "open": load.figures(given.seconds)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON, added to")
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--switches", default="layers")
    parser.add_argument("--budgets", default="0.5,0.7,1")
    parser.add_argument("--seconds", type=float, default=15, help="of open questions; 0 for none")
    parser.add_argument("--clients", type=int, default=32, help="of closed questions")
    parser.add_argument("--closed-seconds", type=float, default=8)
    parser.add_argument("--settings", help="separated by semicolons; all by default")
    parser.add_argument("--port", type=int, default=8123)
    given = parser.parse_args()
    others = [b for b in given.budgets.split(",") if b != "1"]
    settings = ["1", given.budgets, *others, "transformers"]
    chosen = given.settings.split(";") if given.settings else settings
    known: dict[str, Any] = {}
    if given.output.exists():
        known = read_json(given.output, "measurements")
    for setting in chosen:
        if setting in known:
            continue
        command = command_of(setting, given.model, given.switches, given.port)
        planned = setting != "transformers"
        name = given.model if planned else command[2]
        budgets = [float(b) for b in setting.split(",")] if planned else []
        with served(command, given.port) as url:
            base = known.get("1")
            known[setting] = asyncio.run(measure(url, name, budgets, given, base))
        write_text(given.output, json.dumps(known, indent=1) + "\n")
    wrong = [setting for setting, found in known.items() if _is_wrong(found)]
    if wrong:
        where = ", ".join(wrong)
        print(
            f"nothing to report: answers under load differ or are lost ({where})", file=sys.stderr
        )
        return 1
    show(known)
    return 0


def _is_wrong(found: dict[str, Any]) -> bool:
    loads = [found[how] for how in ("closed", "open") if how in found]
    return any(load["differing"] or load["lost"] for load in loads)


def show(known: dict[str, Any]) -> None:
    """A table for each way of asking."""
    columns = {
        "budgets": "{setting}",
        "answers/s": "{answers_per_second:.1f}",
        "in time and right/s": "{goodput:.1f}",
        "in time": "{kept:.1%}",
        "right": "{accuracy:.1%}",
        "median s": "{median_seconds:.3f}",
        "refused": "{refused}",
        "lost": "{lost}",
    }
    for how in ("closed", "open"):
        rows = [{"setting": s, **found[how]} for s, found in known.items() if how in found]
        print_records(columns, rows, how)


if __name__ == "__main__":
    sys.exit(main())
