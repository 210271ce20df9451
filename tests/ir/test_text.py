import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import PARTS, SITE_KINDS, Binding, Block, Graph, Operator, Site
from planner.ir.graph_text import fingerprint, parse_graph, print_graph
from planner.ir.kinds import KINDS

words = st.text("abcxyz019_.+", min_size=1, max_size=6).filter(lambda w: not w.isdecimal())
counts = st.integers(0, 10**6)
symbols = st.sampled_from(["batch", "images", "query", "context", "query.2", "context.2"])
sizes = st.builds(
    lambda constant, terms: Dim(constant, tuple(sorted(terms.items()))),
    counts,
    st.dictionaries(symbols, st.integers(1, 99), max_size=2),
)
token_counts = st.builds(
    lambda s, c: Dim(0, ((s, c),)), st.sampled_from(["query", "context"]), st.integers(1, 9)
)
values = {"word": words, "count": counts, "tokens": counts | token_counts}


def attributes_of(kind):
    """Any of the attributes that a kind's record names, with values of their type."""
    named = {a.name: values[a.type] for a in KINDS[kind].attributes}
    drawn = st.fixed_dictionaries({}, optional=named)
    return drawn.map(lambda found: {"kind": kind, "attributes": tuple(sorted(found.items()))})


def operator(facts, **others):
    return Operator(**facts, **others)


operators = st.builds(
    operator,
    facts=st.sampled_from(sorted(KINDS)).flatmap(attributes_of),
    name=words,
    inputs=st.lists(words, max_size=3).map(tuple),
    shape=st.lists(sizes, max_size=4).map(tuple),
    module=words | st.just(""),
    part=st.sampled_from(PARTS),
    layer=st.none() | st.integers(0, 99),
    narrowed_by=st.lists(st.tuples(words, words), max_size=2).map(tuple),
)
bindings = st.builds(
    Binding,
    module=words,
    axis=st.sampled_from(["in", "out"]),
    blocks=st.lists(st.builds(Block, counts, counts, counts), min_size=1, max_size=3).map(tuple),
)
sites = st.builds(
    Site,
    name=words,
    kind=st.sampled_from(SITE_KINDS),
    layer=st.integers(0, 99),
    module=words | st.just(""),
    lanes=counts,
    switches=counts,
    bindings=st.lists(bindings, max_size=3).map(tuple),
)
graphs = st.builds(
    Graph,
    name=words,
    operators=st.lists(operators, max_size=4).map(tuple),
    sites=st.lists(sites, max_size=3).map(tuple),
    properties=st.dictionaries(words, counts | words, max_size=3),
)

TEXT = """\
graph two
property decoder_layers 1
site mlp.0 mlp layer=0 lanes=96 switches=1 module=mlp mlp.up.out[0:1:1]
%x = input() [batch, query, 64] @decoder
%mlp.up = linear(%x) [batch, query, 96] {bias=0, in=64, out=96} in = @decoder.0 narrow out:mlp.0
end
"""


@given(graphs)
def test_what_is_printed_is_read_back(graph):
    text = print_graph(graph)
    assert parse_graph(text) == graph
    assert print_graph(parse_graph(text)) == text


def test_remarks_are_not_read_back():
    graph = parse_graph(TEXT)
    remarked = print_graph(graph, lambda operator: f"{operator.kind} costs 3 = three")
    assert "; linear costs 3" in remarked
    assert parse_graph(remarked) == graph


def test_a_word_is_a_word_whatever_it_looks_like():
    """Functions are named by the model's code: context_gate, query, 2."""
    for word in ("context_gate", "query", "2", "a*b"):
        line = f"%act = elementwise(%x) [batch, query, 64] {{function={word}}} @decoder.0\n"
        text = TEXT.replace("end\n", line + "end\n")
        assert parse_graph(text).by_name["act"]["function"] == word


def test_every_field_is_read():
    graph = parse_graph(TEXT)
    assert graph.properties == {"decoder_layers": 1}
    assert graph.sites == (
        Site("mlp.0", "mlp", 0, "mlp", 96, 1, (Binding("mlp.up", "out", (Block(0, 1, 1),)),)),
    )
    assert graph.by_name["mlp.up"] == Operator(
        "mlp.up",
        "linear",
        ("x",),
        (Dim.of("batch"), Dim.of("query"), Dim(96)),
        "mlp.up",
        "decoder",
        0,
        (("bias", 0), ("in", 64), ("out", 96)),
        (("out", "mlp.0"),),
    )


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("graph two\n", "", "line 1 of the graph: it should begin with 'graph'"),
        ("graph two\n", "graph two\nproperty decoder_layers 2\n", "is given twice"),
        ("= linear(", "= liner(", "line 5 of the graph: operator mlp.up has unknown kind 'liner'"),
        ("@decoder.0", "@decodr.0", "operator mlp.up has unknown part 'decodr'"),
        ("(%x)", "(x)", "operator mlp.up: input 'x' lacks its %"),
        ("query, 96", "query, -96", "operator mlp.up: '-96' is not a size"),
        ("bias=0", "bias", "operator mlp.up: 'bias' is not an attribute"),
        ("out=96", "out=9*", "operator mlp.up: '9*' is not a size"),
        ("bias=0", "bais=0", "operator mlp.up: linear has no attribute 'bais'"),
        ("%mlp.up = ", "", "is not an operator"),
        ("lanes=96", "lanes=many", "line 3 of the graph: 'site mlp.0 mlp"),
        ("[0:1:1]", "[0:1]", "'mlp.up.out[0:1]' is not a binding"),
        ("[0:1:1]", "", "'mlp.up.out' is not a binding"),
    ],
)
def test_a_broken_line_is_named(old, new, complaint):
    assert old in TEXT
    with pytest.raises(InputError) as caught:
        parse_graph(TEXT.replace(old, new))
    assert complaint in str(caught.value)


@pytest.mark.parametrize("kept", range(1, 6))
def test_a_graph_that_was_cut_off_is_refused(kept):
    lines = TEXT.splitlines()[:kept]
    with pytest.raises(InputError, match="cut off"):
        parse_graph("\n".join(lines))


def test_nothing_stands_behind_the_end():
    assert parse_graph(TEXT + "\n  ; a remark\n") == parse_graph(TEXT)
    with pytest.raises(InputError, match=r"line 7 of the graph: it goes on behind its 'end'"):
        parse_graph(TEXT + "%y = input() [batch, query, 64] @decoder\n")


def test_a_digest_without_letters_is_no_number():
    layers = "property decoder_layers 1\n"
    text = TEXT.replace(layers, f"{layers}property fingerprint 0123456789012345\n")
    assert parse_graph(text).properties["fingerprint"] == "0123456789012345"
    assert print_graph(parse_graph(text)) == text


def test_nothing_is_no_graph():
    with pytest.raises(InputError, match="the graph is empty"):
        parse_graph("\n\n")


def test_the_fingerprint_is_of_the_structure_alone():
    graph = parse_graph(TEXT)
    renamed = dataclasses.replace(graph, name="other", properties={"decoder_layers": 7})
    assert fingerprint(renamed) == fingerprint(graph)
    wider = parse_graph(TEXT.replace("96", "128"))
    assert fingerprint(wider) != fingerprint(graph)
