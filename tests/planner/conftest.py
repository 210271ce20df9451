import json
import logging

import pytest

from planner.cli import execute as run


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Lowered graphs are cached for the session, apart from the user's own cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PLANNER_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def cli_json(cli):
    """Run a command with --json: its one document."""

    def call(*arguments):
        code, out, err = cli(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def fresh_compiler():
    """torch.compile knows of nothing that was compiled before."""
    import torch
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def logged(caplog):
    """Messages of planner's own logger."""
    caplog.set_level(logging.INFO, logger="planner")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "planner"]
