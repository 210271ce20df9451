"""What gets installed, under which names, and what importing it costs."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Folder of the repository -> folder in the package.
FOLDERS = {
    "planner": "planner",
    "ir": "planner/ir",
    "kernels": "planner/kernels",
    "models": "planner/models",
    "training": "planner/training",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built with setuptools alone from a copy of the sources: no network, no old build/."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return source / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_nothing_but_planner_is_installed(files):
    tops = {name.partition("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"planner"}


def test_every_module_is_installed(files):
    """A sub-package that pyproject.toml does not list would be left out silently."""
    modules = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert modules <= files


@pytest.mark.parametrize(
    "name",
    [
        "planner/py.typed",
        "planner/aliases/llava-7b.json",
        "planner/aliases/llava-13b.json",
        "planner/aliases/mipha-3b.json",
        "planner/ir/cost/devices.yaml",
        "planner/models/tiny_llava/config.json",
        "planner/training/configs/tiny-llava.yaml",
    ],
)
def test_data_files_are_installed(files, name):
    assert name in files


def python(code, folder, **environment):
    """Run code with the interpreter's own packages: (the JSON it prints)."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = (
        "import json, planner, planner.planning.catalog as c, planner.ir.cost.device_table as d; "
        "c.find_model('llava-7b'); c.find_model('tiny-llava'); "
        "print(json.dumps([planner.__file__, d.__file__, 'v100' in d.devices()]))"
    )
    package, devices, known = python(code, tmp_path, PYTHONPATH=str(installed))
    assert Path(package).is_relative_to(installed)
    assert Path(devices).is_relative_to(installed)
    assert known


def test_deciding_and_the_command_line_are_imported_without_torch():
    """Every module of them, since a command imports what it needs as it runs."""
    code = (
        "import importlib, json, pkgutil, sys, planner.cli, planner.planning, planner.solver; "
        "import planner.audit, planner.api, planner.plan, planner.schedule, planner.loading; "
        "of = lambda p: [m.name for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.')]; "
        "names = of(planner.audit) + of(planner.cli) + of(planner.planning) + of(planner.solver); "
        "[importlib.import_module(name) for name in names]; "
        "heavy = [m for m in ('torch', 'transformers', 'triton') if m in sys.modules]; "
        "print(json.dumps([heavy, len(names)]))"
    )
    heavy, modules = python(code, ROOT)
    assert heavy == []
    assert modules > 40


def test_our_kernels_and_hugging_faces_live_side_by_side():
    """transformers imports Hugging Face's `kernels`, which the folder kernels/ must not shadow."""
    code = (
        "import json; from transformers import LlavaForConditionalGeneration as model; "
        "import kernels, planner.kernels, planner.models, planner.training; "
        "print(json.dumps([kernels.__file__, list(planner.kernels.__path__)]))"
    )
    theirs, ours = python(code, ROOT)
    assert not Path(theirs).is_relative_to(ROOT / "kernels")
    assert [Path(path).resolve() for path in ours] == [ROOT / "kernels"]
