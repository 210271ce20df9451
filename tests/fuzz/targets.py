"""What is fuzzed: whatever planner reads or is told, as mutated inputs and what takes them."""

import io
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from mutations import HOSTILE, mutated_bytes, mutated_document, mutated_text
from PIL import Image

from planner.documents import dump_yaml, parse_yaml, signature
from planner.ir.errors import InputError
from planner.ir.graph_text import parse_graph
from planner.ir.verify import verify
from planner.loading import load_image
from planner.plan import dump_plan, load_plan
from planner.planning.budgets import Budget
from planner.planning.catalog import find_model, tiny_llava_folder
from planner.planning.compiler import compile_plan
from planner.planning.figures import check_figures
from planner.planning.request import Request
from planner.planning.utilities import load_utilities, prior, save_utilities

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """Inputs, and what must take each of them or refuse it with an InputError."""

    inputs: Callable[[], st.SearchStrategy[Any]]
    take: Callable[[Any], None]


@cache
def _compiled():
    return (
        compile_plan(Request("tiny-llava", budget=0.5, tokens="fastv:k=2,r=0.5")),
        compile_plan(Request("tiny-llava", budget="kv=0.6", kv="h2o:heavy=0.3,recent=0.3")),
    )


@cache
def _scratch():
    return Path(tempfile.mkdtemp(prefix="planner-fuzz-"))


def _file(name, contents):
    path = _scratch() / name
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode(errors="replace"))
    return path


# -- plans ----------------------------------------------------------------------------------------


def _plans():
    texts = [dump_plan(compiled.plan) for compiled in _compiled()]
    documents = [parse_yaml(text, "it") for text in texts]
    return st.one_of(mutated_text(texts), mutated_document(documents))


def _take_plan(plan):
    if isinstance(plan, dict):
        with suppress(TypeError, ValueError):
            plan["digest"] = signature(plan)
        plan = dump_yaml(plan)
    loaded = load_plan(_file("plan.yaml", plan))
    graph = _compiled()[0].graph
    check_figures(loaded, graph)
    assert load_plan(_file("again.yaml", dump_plan(loaded))) == loaded


# -- graphs ---------------------------------------------------------------------------------------


def _graphs():
    folder = Path(__file__).parent.parent / "ir" / "golden"
    texts = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    return mutated_text([text for text in texts if text.startswith("graph ")])


def _take_graph(text):
    verify(parse_graph(text))


# -- options --------------------------------------------------------------------------------------

_GRAMMAR = st.one_of(
    st.sampled_from(["all", "layers,heads", "tokens", "adallava-l", "fastv:k=2,r=0.5", "0.65"]),
    st.sampled_from(["h2o:heavy=0.2,recent=0.2", "kv=256MiB", "latency=49ms", "sparsevlm", "llm"]),
    st.sampled_from(["prumerge+:max=0.25", "visionzip", "uniform:keep=9", "a100-80g", "prior"]),
)


def _options():
    _compiled()
    names = [name for name in Request.__dataclass_fields__ if name not in ("model", "uniform")]
    value = st.one_of(
        st.sampled_from(HOSTILE), _GRAMMAR, _GRAMMAR.flatmap(lambda text: mutated_text([text]))
    )
    return st.dictionaries(st.sampled_from(names), value, min_size=1, max_size=3)


def _take_options(options):
    if "budget" in options:
        Budget.of(options["budget"])
    # An answer is wanted, not the best one.
    limit = options.pop("time_limit_seconds", 0.05)
    if isinstance(limit, int | float) and limit == limit and limit > 1:
        limit = 1.0
    compiled = compile_plan(Request("tiny-llava", time_limit_seconds=limit, **options))
    check_figures(compiled.plan, compiled.graph)


# -- pictures -------------------------------------------------------------------------------------


@cache
def _pictures():
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    found = []
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, form)
        found.append(stream.getvalue())
    for mode in ("I;16", "F", "I", "P", "1", "LA", "RGBA", "CMYK"):
        stream = io.BytesIO()
        Image.new(mode, (5, 7), 1).save(stream, "TIFF")
        found.append(stream.getvalue())
    return found


def _take_picture(contents):
    picture = load_image(_file("picture", contents))
    assert picture.mode == "RGB"
    assert 0 < picture.size[0] * picture.size[1] <= 16_000_000


# -- utilities ------------------------------------------------------------------------------------


@cache
def _utilities_file():
    compiled = _compiled()[0]
    path = _scratch() / "whole.npz"
    save_utilities(path, prior(compiled.graph, compiled.pricing.work()), compiled.graph)
    return path.read_bytes()


def _utilities():
    with np.load(io.BytesIO(_utilities_file())) as arrays:
        whole = dict(arrays)
    names = st.sampled_from([*whole, "x", "tokens", "saturation", "layer.99"])
    values = st.sampled_from(
        [np.zeros(0), np.zeros((2, 2)), np.array(1e308), np.array(np.nan), np.array("x"),
         np.array(True), np.ones(3, np.float16), np.ones(2, complex), np.array(-1e-320),
         np.array(0.0), np.array(10**18), np.ones(8) * -1e99]
    )  # fmt: skip
    changed = st.tuples(names, values).map(lambda change: whole | {change[0]: change[1]})
    return st.one_of(mutated_bytes([_utilities_file()]), changed)


def _take_utilities(contents):
    if isinstance(contents, dict):
        stream = io.BytesIO()
        np.savez(stream, **contents)
        contents = stream.getvalue()
    graph = _compiled()[0].graph
    found = load_utilities(_file("u.npz", contents), graph)
    for site in graph.sites:
        with suppress(InputError):
            assert np.isfinite(found.of_site(site)).all()


# -- configs --------------------------------------------------------------------------------------


def _configs():
    # What is imported by the first case alone.
    find_model("tiny-llava").load_config()
    whole = (tiny_llava_folder() / "config.json").read_text()
    return st.one_of(mutated_text([whole]), mutated_document([json.loads(whole)]))


def _take_config(config):
    if isinstance(config, dict):
        config = json.dumps(config)
    folder = _file("config.json", config).parent
    find_model(str(folder)).load_config()


TARGETS = {
    "plans": Target(_plans, _take_plan),
    "graphs": Target(_graphs, _take_graph),
    "options": Target(_options, _take_options),
    "pictures": Target(lambda: mutated_bytes(_pictures()), _take_picture),
    "utilities": Target(_utilities, _take_utilities),
    "configs": Target(_configs, _take_config),
}
