"""Shared by all tests: the modules beside this file, and golden text."""

import atexit
import gc
import os
import sys
from pathlib import Path

import pytest

# Without a network, whoever asks the hub waits for its retries.
os.environ["HF_HUB_OFFLINE"] = "1"

import planner  # noqa: F401 - before the folder tests/planner can be mistaken for it

# Makes ``from families import FAMILIES`` work in every folder of tests.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collectstart():
    """Collect no garbage while tests and libraries are imported."""
    gc.disable()


def pytest_collection_finish():
    """Take what imports made, which stays, out of garbage collections: each run of a trainer has
    one, and walking torch and transformers would take it half a second."""
    gc.freeze()
    gc.enable()
    # Some libraries report as leaked what is still frozen when Python ends.
    atexit.register(gc.unfreeze)


@pytest.fixture
def golden(request):
    """Compare text with a file in the folder ``golden`` beside the test.

    With PLANNER_UPDATE_GOLDEN=1 (``make golden``) the file is rewritten instead.
    """
    folder = request.path.parent / "golden"

    def compare(name, text):
        path = folder / name
        if os.environ.get("PLANNER_UPDATE_GOLDEN") == "1":
            folder.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} does not exist: run make golden and read it"
        assert text == path.read_text(encoding="utf-8"), f"{name} differs: run make golden?"

    return compare
