"""The cache of lowered graphs: a second compile of the same model needs no torch.

One text file per graph in the user's cache folder, keyed by the model's config, the library
versions and the lowering's own source. Entries are written whole or not at all, so processes may
share the folder; an entry that cannot be read back is rebuilt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from platformdirs import user_cache_path

from planner import __version__
from planner.documents import digest_of, parse_json
from planner.files import MEBIBYTE, read_text, write_text
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.graph_text import parse_graph, print_graph
from planner.planning.catalog import Source

# A graph of the largest models has a few MiB.
_MOST_BYTES = 64 * MEBIBYTE


def cache_folder() -> Path:
    """``PLANNER_CACHE`` or the user's cache folder."""
    override = os.environ.get("PLANNER_CACHE")
    return Path(override) if override else user_cache_path("planner")


@cache
def _lowering_source() -> str:
    """Digest of the code that makes graphs: a changed lowering makes old entries stale."""
    digest = hashlib.sha256()
    # Not `files("planner.ir.lowering")`, which would import it, and torch with it.
    for folder in (files("planner.ir") / name for name in ("", "kinds", "lowering")):
        for entry in sorted(folder.iterdir(), key=lambda e: e.name):
            if entry.name.endswith(".py"):
                digest.update(entry.read_bytes())
    return digest.hexdigest()


def graph_key(source: Source) -> str:
    """What an entry depends on, as a file name."""
    versions = [__version__, version("torch"), version("transformers")]
    facts = [source.config, versions, _lowering_source(), source.trust_remote_code]
    return digest_of(facts)[:32]


def _read(path: Path) -> tuple[Graph, tuple[str, ...]] | None:
    try:
        head, _, body = read_text(path, "graph", _MOST_BYTES).partition("\n")
        facts = parse_json(head, "the head of the graph")
        if facts["digest"] != hashlib.sha256(body.encode()).hexdigest():
            return None
        return parse_graph(body), tuple(facts["notes"])
    except (KeyError, TypeError, InputError):
        return None


def lowered_graph(source: Source) -> tuple[Graph, tuple[str, ...], bool]:
    """The Graph of a model, from the cache or lowered now; (graph, notes, from cache)."""
    path = cache_folder() / "graphs" / f"{graph_key(source)}.txt"
    found = _read(path)
    if found is not None:
        graph, notes = found
        return replace(graph, name=source.name), notes, True
    from planner.ir.lowering import lower_config

    lowered = lower_config(source.load_config(), source.name)
    body = print_graph(lowered.graph)
    facts = {"digest": hashlib.sha256(body.encode()).hexdigest(), "notes": list(lowered.notes)}
    # A cache that cannot be written costs time, nothing else.
    with contextlib.suppress(OSError, InputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(facts) + "\n" + body)
    return lowered.graph, lowered.notes, False
