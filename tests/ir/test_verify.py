import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import Block, Graph
from planner.ir.graph_text import fingerprint, parse_graph, print_graph
from planner.ir.verify import RULES, verify

LAYER = "model.language_model.layers.1"
UP, DOWN, ADD = f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj", f"{LAYER}.add_1"
ATTENTION, QUERY = f"{LAYER}.self_attn.attention", f"{LAYER}.self_attn.q_proj"


@pytest.fixture
def good(small):
    graph = small()
    verify(graph)
    return graph


def with_operator(graph, operator, /, **changes):
    """The graph with fields of one operator replaced."""
    assert operator in graph.by_name
    return graph.replacing(replace(o, **changes) if o.name == operator else o for o in graph)


def having(graph, name, **attributes):
    return with_operator(
        graph, name, attributes=graph.by_name[name].having(**attributes).attributes
    )


def without_attribute(graph, name, attribute):
    pairs = graph.by_name[name].attributes
    return with_operator(graph, name, attributes=tuple(p for p in pairs if p[0] != attribute))


def with_site(graph, site, /, **changes):
    return graph.replacing(
        graph.operators, (replace(s, **changes) if s.name == site else s for s in graph.sites)
    )


def with_binding(graph, name, number, **changes):
    bindings = list(graph.sites_by_name[name].bindings)
    bindings[number] = replace(bindings[number], **changes)
    return with_site(graph, name, bindings=tuple(bindings))


def swapped(graph, first, second):
    operators = list(graph.operators)
    i, j = (operators.index(graph.by_name[name]) for name in (first, second))
    operators[i], operators[j] = operators[j], operators[i]
    return graph.replacing(operators)


def shape(*sizes):
    return tuple(map(Dim.of, sizes))


# rule -> ways to break it: (how, what the complaint must say).
BROKEN = {
    "sizes are those of a model": [
        (lambda g: with_operator(g, UP, shape=shape("batch", "query", 0)), f"{UP} has a size of 0"),
        (lambda g: with_operator(g, UP, shape=shape(0, "query", 48)), f"{UP} has a size of 0"),
        (lambda g: having(g, DOWN, out=1 << 50), f"{DOWN} has a size of more than"),
        (
            lambda g: with_operator(g, ADD, shape=(Dim.of("query") * (1 << 50),)),
            "size of more than",
        ),
        (lambda g: with_site(g, "mlp.1", lanes=10**12), "site mlp.1 has more than"),
        (lambda g: with_binding(g, "mlp.1", 0, blocks=(Block(0, 1 << 50, 1),)), "features beyond"),
        (
            lambda g: replace(g, properties={**g.properties, "decoder_layers": 10**9}),
            "the property decoder_layers",
        ),
    ],
    "linears are narrowed on both sides": [
        (
            lambda g: with_operator(g, UP, narrowed_by=(("out", "mlp.1"),)),
            f"{UP} is narrowed in its outputs unlike in its shape",
        ),
        (
            lambda g: with_operator(g, DOWN, narrowed_by=(("bias", "mlp.1"),)),
            f"{DOWN}",
        ),
    ],
    "names are unique": [
        (lambda g: with_operator(g, UP, name=DOWN), f"two operators have the name '{DOWN}'"),
        (lambda g: with_site(g, "mlp.1", name="mlp.2"), "two sites have the name 'mlp.2'"),
        (lambda g: with_operator(g, "lm_head", name="lm head"), "'lm head' cannot be"),
    ],
    "properties are there": [
        (lambda g: replace(g, properties={}), "lacks the property decoder_layers"),
        (lambda g: replace(g, properties={**g.properties, "hidden_size": "x"}), "hidden_size"),
    ],
    "kinds and parts are known": [
        (lambda g: with_operator(g, UP, kind="liner"), f"{UP} has unknown kind 'liner'"),
        (lambda g: with_operator(g, UP, part="body"), f"{UP} has unknown part 'body'"),
        (lambda g: with_site(g, "mlp.1", kind="block"), "mlp.1 has unknown kind 'block'"),
    ],
    "inputs exist": [
        (lambda g: with_operator(g, DOWN, inputs=("gone",)), f"{DOWN} reads gone"),
    ],
    "inputs come first": [
        (lambda g: swapped(g, UP, DOWN), f"{LAYER}.mlp.multiply stands before {UP}"),
        (lambda g: with_operator(g, UP, inputs=(ADD,)), "reads its own output"),
        (lambda g: with_operator(g, UP, inputs=(UP,)), f"{UP} reads its own output"),
    ],
    "attributes fit the kind": [
        (lambda g: without_attribute(g, UP, "in"), f"{UP} (linear) lacks the attribute in"),
        (lambda g: having(g, UP, **{"in": 0}), f"attribute in of operator {UP} is 0"),
        (lambda g: having(g, UP, bias=-1), f"attribute bias of operator {UP} is -1"),
        (lambda g: having(g, UP, out="wide"), f"attribute out of operator {UP} is wide"),
        (lambda g: having(g, ATTENTION, heads=Dim.of("query")), f"heads of operator {ATTENTION}"),
        (
            lambda g: having(g, f"{LAYER}.mlp.act_fn.activation", function=3),
            "attribute function of operator",
        ),
        (
            lambda g: with_operator(g, UP, attributes=(*g.by_name[UP].attributes, ("bias", 1))),
            f"{UP} has attributes out of order or twice",
        ),
        (lambda g: having(g, UP, function="silu"), f"{UP} has the attribute function, linear has"),
        (lambda g: having(g, ATTENTION, window=0), f"window of operator {ATTENTION} is 0"),
    ],
    "shapes fit the attributes": [
        (lambda g: having(g, UP, out=80), f"{UP} with shape [batch, query, 96] should have 80"),
        (lambda g: having(g, ATTENTION, heads=2), f"{ATTENTION} with shape"),
        (lambda g: having(g, ATTENTION, kv_heads=3), "heads in 3 equal groups"),
        (lambda g: having(g, ATTENTION, value_dim=8), "8 features (value_dim)"),
        (lambda g: with_operator(g, UP, shape=()), f"{UP} has no shape"),
        (
            lambda g: with_operator(g, ADD, shape=shape("batch", "tokens", 64)),
            f"{ADD} has the unknown size tokens",
        ),
    ],
    "shapes fit the inputs": [
        (lambda g: having(g, UP, **{"in": 65}), f"{UP} takes 65 features"),
        (
            lambda g: with_operator(g, ADD, shape=shape("batch", "query", 128)),
            f"{ADD} cannot broadcast {LAYER}.add to its shape",
        ),
    ],
    "sites are well formed": [
        (lambda g: with_site(g, "mlp.1", name="mlp.one"), "mlp.one should be called mlp.1"),
        (lambda g: with_site(g, "mlp.1", name="mlp.9", layer=9), "mlp.9 lies in layer 9 of 3"),
        (lambda g: with_site(g, "mlp.1", switches=97), "mlp.1 divides 96 lanes into 97"),
        (lambda g: with_site(g, "mlp.1", switches=0), "mlp.1 divides 96 lanes into 0"),
    ],
    "layers exist": [
        (lambda g: with_operator(g, UP, layer=3), f"{UP} lies in layer 3 of 3"),
    ],
    "narrowings refer to something": [
        (lambda g: with_operator(g, UP, narrowed_by=(("out", "mlp.7"),)), "by mlp.7, which does"),
        (lambda g: with_operator(g, UP, narrowed_by=(("outs", "mlp.1"),)), f"{UP} has no count"),
        (lambda g: with_operator(g, UP, narrowed_by=(("shape.3", "mlp.1"),)), "no count shape.3"),
        (lambda g: with_operator(g, UP, narrowed_by=(("shape.1", "mlp.1"),)), "no count shape.1"),
        (lambda g: with_operator(g, UP, narrowed_by=(("shape.²", "mlp.1"),)), "no count shape"),
        (lambda g: with_site(g, "mlp.1", lanes=95), "no multiple of the 95 lanes of mlp.1"),
        (lambda g: with_site(g, "mlp.1", lanes=0, switches=1), "no multiple of the 0 lanes"),
    ],
    "narrowings flow to the readers": [
        (
            lambda g: with_operator(g, DOWN, narrowed_by=()),
            f"{DOWN} reads {LAYER}.mlp.multiply, but mlp.1 does not narrow it",
        ),
    ],
    "lanes are disjoint and cover": [
        (
            lambda g: with_binding(g, "heads.1", 0, blocks=(Block(0, 16, 32),)),
            f"heads.1 binds {QUERY}.out: feature 16 belongs to two lanes",
        ),
        (
            lambda g: with_binding(g, "heads.1", 0, blocks=(Block(0, 32, 16),)),
            "feature 16 belongs to no lane",
        ),
        (
            lambda g: with_binding(g, "heads.1", 0, blocks=(Block(0, 16, 16),)),
            "the lanes cover 32 of 64 features",
        ),
        (
            lambda g: with_binding(g, "heads.1", 0, blocks=(Block(0, 64, 64),)),
            "the lanes cover 128 of 64 features",
        ),
        (lambda g: with_binding(g, "mlp.1", 0, axis="over"), "mlp.1 binds axis 'over'"),
        (
            lambda g: with_binding(g, "mlp.1", 0, module=UP),
            f"mlp.1 binds {UP}.out twice",
        ),
    ],
}


def test_every_rule_is_broken_somewhere():
    assert set(BROKEN) == set(RULES)


@pytest.mark.parametrize(
    ("rule", "number"), [(rule, i) for rule, cases in BROKEN.items() for i in range(len(cases))]
)
def test_a_broken_graph_is_refused(rule, number, good):
    breaking, complaint = BROKEN[rule][number]
    broken = breaking(good)
    assert any(complaint in found for found in RULES[rule](broken)), list(RULES[rule](broken))
    with pytest.raises(InputError, match="the graph is broken: "):
        verify(broken)


@pytest.mark.parametrize("rule", RULES)
def test_a_good_graph_breaks_nothing(rule, good):
    assert list(RULES[rule](good)) == []


def test_a_graph_of_nothing_is_refused():
    with pytest.raises(InputError, match="lacks the property"):
        verify(Graph("none", ()))


# -- text that was tampered with ------------------------------------------------------------------


def deleted(lines, rng):
    del lines[rng.randrange(len(lines))]


def doubled(lines, rng):
    position = rng.randrange(len(lines))
    lines.insert(position, lines[position])


def moved(lines, rng):
    line = lines.pop(rng.randrange(len(lines)))
    lines.insert(rng.randrange(len(lines) + 1), line)


def joined(lines, rng):
    position = rng.randrange(len(lines) - 1)
    lines[position : position + 2] = ["".join(lines[position : position + 2])]


def edited(lines, rng):
    position = rng.randrange(len(lines))
    line = lines[position]
    at = rng.randrange(len(line) + 1)
    put = rng.choice(
        ["", "0", "7", "x", "²", "٣", " ", ",", "%", "*", "+", "=", "]", "(", ":", "."]
    )
    lines[position] = line[:at] + put + line[at + rng.randrange(3) :]


def swapped_words(lines, rng):
    position = rng.randrange(len(lines))
    words = lines[position].split(" ")
    other = lines[rng.randrange(len(lines))].split(" ")
    words[rng.randrange(len(words))] = rng.choice(other)
    lines[position] = " ".join(words)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    changes=st.lists(
        st.sampled_from([deleted, doubled, moved, joined, edited, swapped_words]),
        min_size=1,
        max_size=3,
    ),
)
def test_tampered_text_is_refused_or_a_sound_graph(seed, changes, small):
    """Nothing but an InputError, and no graph that passes for the original without being it."""
    original = small()
    rng = random.Random(seed)
    lines = print_graph(original).splitlines()
    for change in changes:
        change(lines, rng)
    try:
        graph = parse_graph("\n".join(lines))
        verify(graph)
    except InputError:
        return
    text = print_graph(graph)
    assert print_graph(parse_graph(text)) == text
    if fingerprint(graph) == original.properties["fingerprint"]:
        assert graph.operators == original.operators
        assert graph.sites == original.sites
