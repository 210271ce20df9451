"""The first docstring of every folder names what is in the folder, and nothing else."""

import ast
import re
from pathlib import Path

import pytest

import planner.ir

ROOT = Path(planner.ir.__file__).resolve().parent
FOLDERS = [ROOT, *(path for path in ROOT.iterdir() if (path / "__init__.py").exists())]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_map_of_a_folder_is_complete(folder):
    module = ast.parse((folder / "__init__.py").read_text())
    text = ast.get_docstring(module, clean=False) or ""
    named = re.findall(r"^    (\w+)  ", text, re.MULTILINE)
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    folders = {path.name for path in folder.iterdir() if (path / "__init__.py").exists()}
    assert sorted(named) == sorted(modules | folders)
