"""Every folder says what lies in it, and no two files share a name."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPS = ("ir", "kernels", "models", "planner", "training")
# Every package starts with such a file.
NOT_NAMED = {"__init__.py", "__main__.py", "__pycache__", "py.typed"}


def python_folders():
    """All folders of the package that hold modules, or folders that do; no links."""
    found = {path.parent for top in TOPS for path in (ROOT / top).rglob("*.py")}
    return sorted(
        found | {parent for path in found for parent in path.parents if ROOT in parent.parents}
    )


def map_of(folder):
    """The text that introduces a folder: a package's docstring, else its README."""
    package = folder / "__init__.py"
    if package.is_file():
        return ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
    return (folder / "README.md").read_text(encoding="utf-8")


def named(text):
    """Names at the left of a map's lines, such as ``    solver/   finds the best choice``."""
    lines = re.findall(r"^    (\w+/?(?:, \w+/?)*)(?: {2,}\S.*)?$", text, re.MULTILINE)
    return [name.rstrip("/") for line in lines for name in line.split(", ")]


def contents(folder):
    """Names of modules and of folders."""
    paths = [path for path in folder.iterdir() if path.name not in NOT_NAMED]
    return [path.stem for path in paths if path.suffix == ".py" or path.is_dir()]


@pytest.mark.parametrize("folder", python_folders(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_folder_s_map_is_complete(folder):
    assert sorted(named(map_of(folder))) == sorted(contents(folder))


def test_no_two_files_share_a_name():
    """But for an op and its Triton kernel."""
    paths = {path for top in TOPS for path in (ROOT / top).rglob("*.py")}
    paths -= set((ROOT / "kernels/triton").glob("*.py"))
    paths |= {
        path
        for path in (ROOT / "kernels/triton").glob("*.py")
        if not (ROOT / "kernels/ops" / path.name).exists()
    }
    counts = Counter(path.name for path in paths if path.name not in NOT_NAMED)
    assert [name for name, count in counts.items() if count > 1] == []
