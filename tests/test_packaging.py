"""What gets installed, under which names, and what importing it costs."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import planner

ROOT = Path(__file__).parent.parent
# Folder of the repository -> folder in the package.
FOLDERS = {
    "planner": "planner",
    "ir": "planner/ir",
    "kernels": "planner/kernels",
    "models": "planner/models",
    "training": "planner/training",
}


def run(arguments, folder, **environment):
    """The last line that a Python process prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def python(code, folder, *options, **environment):
    """What code leaves in `result`, run with the interpreter's own packages."""
    whole = f"{code}; import json; print(json.dumps(result))"
    return json.loads(run([*options, "-c", whole], folder, **environment))


def build(what, source):
    """Build ``wheel``, ``sdist`` or ``editable`` with setuptools alone: no network."""
    code = f"from setuptools import build_meta as m; print(m.build_{what}('.'))"
    return source / run(["-W", "error", "-c", code], source)


def unpack(archive, folder):
    shutil.unpack_archive(archive, folder, "zip" if archive.suffix == ".whl" else "gztar")
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clone's files and links, in a folder called as the package is: no old build/ among them."""
    clone = tmp_path_factory.mktemp("parent") / "planner"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, clone / name, ignore=ignored, symlinks=True)
    return clone


@pytest.fixture(scope="module")
def wheel(checkout):
    return build("wheel", checkout)


@pytest.fixture(scope="module")
def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_nothing_but_planner_is_installed(files):
    tops = {name.partition("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"planner"}


def test_every_module_is_installed(files):
    """Through the links in planner/ too, and from folders without an __init__.py."""
    modules = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert modules <= files


def test_one_version(wheel):
    (cited,) = re.findall("^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == planner.__version__
    assert wheel.name.startswith(f"planner-{cited}-")


@pytest.mark.parametrize(
    "name",
    [
        "planner/py.typed",
        "planner/aliases/llava-7b.json",
        "planner/aliases/llava-13b.json",
        "planner/aliases/mipha-3b.json",
        "planner/ir/cost/devices.yaml",
        "planner/models/tiny_llava/config.json",
        "planner/models/deep_llava/config.json",
        "planner/training/configs/tiny-llava.yaml",
    ],
)
def test_data_files_are_installed(files, name):
    assert name in files


# Every folder, one module that reads a data file, and a name that is resolved on first use.
IMPORTS = (
    "import planner.planning.catalog as catalog, planner.ir.cost.device_table as table; "
    "import planner, planner.kernels, planner.models, planner.training; "
    "catalog.find_model('llava-7b'), catalog.find_model('tiny-llava'), planner.compile; "
    "assert 'v100' in table.devices(); "
    "modules = (planner, table, planner.models, planner.training); "
    "result = [module.__file__ for module in modules] + list(planner.kernels.__path__)"
)


def imported(folder, *options, before="pass", **environment):
    """Where Python started in a folder finds planner; nothing here imports torch."""
    return {Path(path) for path in python(f"{before}; {IMPORTS}", folder, *options, **environment)}


def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    installed = unpack(wheel, tmp_path / "installed")
    found = imported(tmp_path, PYTHONPATH=str(installed))
    assert all(path.is_relative_to(installed / "planner") for path in found)


def test_a_source_archive_makes_the_same_wheel(checkout, files, tmp_path):
    (source,) = unpack(build("sdist", checkout), tmp_path).iterdir()
    with zipfile.ZipFile(build("wheel", source)) as archive:
        assert set(archive.namelist()) == files


@pytest.mark.parametrize("place", [".", ".."], ids=["the checkout", "its parent"])
def test_an_editable_install_is_the_checkout(checkout, tmp_path, place):
    """Started in the parent of a clone called planner, Python must not take the clone for it."""
    installed = unpack(build("editable", checkout), tmp_path / "installed")
    libraries = sysconfig.get_path("purelib")
    # As site-packages, without the planner that these tests run from.
    before = (
        f"import sys, site; sys.path.append({libraries!r}); site.addsitedir({str(installed)!r})"
    )
    found = imported(checkout / place, "-S", before=before, PYTHONPATH="")
    assert all(path.is_relative_to(checkout / "planner") for path in found)


def test_a_checkout_works_without_installation(checkout):
    found = imported(checkout)
    assert all(path.is_relative_to(checkout / "planner") for path in found)


def test_deciding_and_the_command_line_are_imported_without_torch():
    """Every module of them, since a command imports what it needs as it runs."""
    code = (
        "import importlib, pkgutil, sys, planner.cli, planner.planning, planner.solver; "
        "import planner.audit, planner.api, planner.plan, planner.schedule, planner.loading; "
        "of = lambda p: [m.name for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.')]; "
        "names = of(planner.audit) + of(planner.cli) + of(planner.planning) + of(planner.solver); "
        "[importlib.import_module(name) for name in names]; "
        "heavy = [m for m in ('torch', 'transformers', 'triton') if m in sys.modules]; "
        "result = [heavy, len(names)]"
    )
    heavy, modules = python(code, ROOT)
    assert heavy == []
    assert modules > 40


def test_our_kernels_and_hugging_faces_live_side_by_side():
    """transformers imports Hugging Face's `kernels`, which the folder kernels/ must not shadow."""
    code = (
        "from transformers import LlavaForConditionalGeneration as model; "
        "import kernels, planner.kernels, planner.models, planner.training; "
        "result = [kernels.__file__, list(planner.kernels.__path__)]"
    )
    theirs, ours = python(code, ROOT)
    assert not Path(theirs).is_relative_to(ROOT / "kernels")
    assert [Path(path).resolve() for path in ours] == [ROOT / "kernels"]
