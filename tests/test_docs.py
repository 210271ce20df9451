"""The documents agree with the code and with one another."""

import os
import re
import textwrap
from pathlib import Path

import apart
import pytest
import typer

from planner.cli.app import app
from planner.cli.debug import LEVELS

ROOT = Path(__file__).parent.parent
# Not part of the project: what tools build, fetch and cache.
SKIPPED = {".git", ".venv", "build", "dist", "node_modules"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def files(*suffixes):
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in SKIPPED and not name.endswith((".egg-info", "_cache", "__pycache__"))
        ]
        yield from (Path(folder, name) for name in names if not suffixes or name.endswith(suffixes))


def test_the_readme_lists_the_commands():
    table = README.partition("\n## Commands\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `planner ([\w-]+)", table, re.MULTILINE)
    known = typer.main.get_command(app).commands
    assert sorted(listed) == sorted(known)


def test_the_readme_s_command_lines_parse():
    """Every option that a command line in the README uses exists."""
    known = typer.main.get_command(app).commands
    lines = re.findall(r"^    planner ([\w-]+)(.*)$", README, re.MULTILINE)
    assert len(lines) >= 5
    for name, rest in lines:
        options = {o for p in known[name].params for o in (*p.opts, *p.secondary_opts)}
        used = set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest))
        assert used <= options, f"planner {name}{rest}"


def test_the_readme_s_example_runs(tmp_path, tmp_path_factory):
    code = textwrap.dedent(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1])
    cache = tmp_path_factory.getbasetemp() / "planner-cache"
    environment = {"PLANNER_CACHE": str(cache)}
    done = apart.run(
        "-c", code.replace("llava-7b", "tiny-llava"), folder=tmp_path, environment=environment
    )
    assert done.returncode == 0, done.stderr
    assert "optimal" in done.stdout
    assert (tmp_path / "plan.yaml").is_file()


def test_every_debug_level_is_documented():
    text = (ROOT / "docs/debugging.md").read_text(encoding="utf-8")
    levels = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert levels == [str(level) for level in range(len(LEVELS))]


def anchors(text):
    """Anchors of a page's headings, as code hosts make them."""
    return {
        re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", sorted(files(".md")), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_the_project_stands_alone():
    """Nothing refers to a folder beside the repository."""
    outside = b"../" + b"shared"
    assert not [path for path in files() if outside in path.read_bytes()]


def test_the_table_of_selectors_is_complete():
    from planner.planning.selectors import SELECTORS

    text = (ROOT / "docs/selectors.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([\w+-]+) +\| (?:before|after|behind)", text, re.MULTILINE)
    assert listed == list(SELECTORS)
