"""Programs in processes of their own, as ``python`` would run them, without its seconds of imports.

A server imports torch and transformers once, nothing of planner, and forks itself for every
program.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.tensor", "transformers.trainer", "accelerate"]
)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Running:
    process: BaseProcess
    printed: Path

    @property
    def said(self) -> str:
        """On stderr, so far."""
        path = self.printed / "stderr"
        return path.read_text() if path.exists() else ""

    def finish(self, timeout: float = 300) -> Done:
        """Wait for the end; a program that takes longer is killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        texts = [(self.printed / name).read_text() for name in ("stdout", "stderr")]
        return Done(self.process.exitcode, *texts)


def start(
    *arguments: object, folder: Path, environment: Mapping[str, str] | None = None
) -> Running:
    """Begin what ``python arguments...`` does in a folder: ``-c code``, ``-m module`` or a path."""
    printed = Path(tempfile.mkdtemp(dir=folder))
    known = {**os.environ, **(environment or {})}
    what = ([str(a) for a in arguments], str(folder), known, str(printed), sys.path)
    process = _SERVER.Process(target=_run, args=what)
    process.start()
    return Running(process, printed)


def run(*arguments: object, folder: Path, environment: Mapping[str, str] | None = None) -> Done:
    """The same to its end."""
    return start(*arguments, folder=folder, environment=environment).finish()


def _run(
    arguments: list[str], folder: str, environment: dict[str, str], printed: str, path: list[str]
) -> None:
    gc.freeze()  # what the server imported stays, and collections need not walk it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{printed}/{name}", os.O_WRONLY | os.O_CREAT), number)
    how = arguments.pop(0) if arguments[0] in ("-c", "-m") else ""
    sys.argv = [how, *arguments[1:]] if how else arguments
    sys.path[:] = path
    if how == "-c":
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif how == "-m":
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
