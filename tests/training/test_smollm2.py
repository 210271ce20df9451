"""The page about SmolLM2 says what was measured."""

import json
from pathlib import Path

from planner.training.experiments.smollm2 import smollm2_page

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_the_page_is_made_of_the_results_beside_it():
    results = json.loads((RESULTS / "smollm2.json").read_text())
    assert smollm2_page(results) == (RESULTS / "smollm2.md").read_text()


def test_the_readme_quotes_the_page():
    rows = [line.split("|") for line in (RESULTS / "smollm2.md").read_text().splitlines()]
    readme = " ".join((RESULTS.parents[1] / "README.md").read_text().split())
    quoted = {("prior", "none"), ("first-order", "none"), ("chain", "refit")}
    news = {(r[1].strip(), r[3].strip()): r[4].strip() for r in rows if r[2:3] == [" joint "]}
    assert all(f"{news[row]} " in readme for row in quoted)
