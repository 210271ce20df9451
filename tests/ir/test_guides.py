"""CONTRIBUTING.md's guides to this folder, each followed with a dummy."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from planner.ir.cost import device_table, price
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.graph_text import parse_graph, print_graph
from planner.ir.kinds import KINDS, Attribute, Kind
from planner.ir.kinds.table import last_is
from planner.ir.passes import PASSES, find_passes, run
from planner.ir.verify import verify

SIZES = {"batch": 2, "query": 3}
TEXT = """\
graph dummy
property decoder_layers 0
property dtype_bytes 2
property hidden_size 64
property image_tokens 0
%x = input() [batch, query, 64] @decoder
%y = hadamard(%x) [batch, query, 64] {function=walsh, order=6, width=64} @decoder
end
"""


HADAMARD = Kind(
    "hadamard",
    "a Hadamard transform of each row, scaled",
    (Attribute("function", "word"), Attribute("order"), Attribute("width")),
    shape_fault=last_is("width"),
    flops=lambda o, n: 2 * o.elements(n) * o.integer("order"),
    weights=lambda o: o.integer("width"),
)


def test_add_an_operator_kind(monkeypatch):
    """A record: the text form reads it, the verifier knows what it must be, and it has a price."""
    with pytest.raises(InputError, match="y has unknown kind 'hadamard'"):
        parse_graph(TEXT)
    monkeypatch.setitem(KINDS, "hadamard", HADAMARD)
    graph = parse_graph(TEXT)
    verify(graph)
    assert print_graph(graph) == TEXT
    cost = price(graph.by_name["y"], graph, SIZES)
    assert (cost.flops, cost.parameters) == (2 * 2 * 3 * 64 * 6, 64)
    assert cost.bytes == 2 * (64 + 2 * 2 * 3 * 64)
    for broken, complaint in (
        (TEXT.replace("order=6, ", ""), "y (hadamard) lacks the attribute order"),
        (TEXT.replace("width=64", "width=32"), "should have 32 features (width)"),
    ):
        with pytest.raises(InputError) as caught:
            verify(parse_graph(broken))
        assert complaint in str(caught.value)


@dataclass(frozen=True)
class Untie:
    """A pass: shared weights are counted apart."""

    name: ClassVar[str] = "untie"

    def apply(self, graph: Graph) -> Graph:
        return graph.replacing(
            replace(o, attributes=tuple(pair for pair in o.attributes if pair[0] != "tied"))
            for o in graph
        )


def test_add_a_pass(monkeypatch, small):
    """A class, and a line in `PASSES`: users name it, and what it leaves is verified."""
    monkeypatch.setitem(PASSES, "untie", Untie)
    graph = small()
    head = graph.by_name["lm_head"].having(tied=1)
    tied = graph.replacing((*graph.operators[:-1], head))
    assert run(tied, find_passes("drop-dead,untie")) == run(graph, find_passes("drop-dead"))


def test_passes_that_need_arguments_are_not_named():
    assert find_passes("") == []
    with pytest.raises(InputError, match="unknown pass 'specialise': choose from drop-dead, "):
        find_passes("specialise")


def test_add_a_device(monkeypatch, tmp_path):
    """A row of the table."""
    row = 'abacus: {tflops: 1, bandwidth_gb_per_s: 2, memory_gb: 3, source: "by hand"}\n'
    table = device_table.files("planner.ir.cost").joinpath("devices.yaml").read_text()
    (tmp_path / "devices.yaml").write_text(table + row)
    monkeypatch.setattr(device_table, "files", lambda _: tmp_path)
    device_table.devices.cache_clear()
    try:
        found = device_table.device("abacus")
        assert (found.operations_per_second, found.bytes_per_second) == (1e12, 2e9)
        assert "v100" in device_table.devices()
    finally:
        monkeypatch.undo()
        device_table.devices.cache_clear()
