from dataclasses import replace

from planner.ir.lowering.whole_model import without_shared
from planner.ir.verify import verify

LAYER = "model.language_model.layers.1"


def with_reader(graph, source, width):
    """The graph with an operator after all layers that reads something inside one."""
    probe = replace(graph.by_name["model.language_model.norm"], name="probe", inputs=(source,))
    probe = replace(probe, shape=graph.by_name[source].shape).having(width=width)
    *body, head = graph.operators
    return graph.replacing([*body, probe, replace(head, inputs=(*head.inputs, "probe"))])


def test_a_graph_in_which_nothing_is_shared_stays_as_it_is(small):
    graph = small()
    assert without_shared(graph) == (graph, [])


def test_heads_whose_keys_others_read_are_no_site(small):
    key = f"{LAYER}.self_attn.rotary_k"
    graph, reasons = without_shared(with_reader(small(), key, 16))
    gone = {"heads.1", "layer.1"}
    assert {s.name for s in small().sites} - {s.name for s in graph.sites} == gone
    assert not any(site in gone for o in graph for _, site in o.narrowed_by)
    assert reasons == [
        f"heads.1: probe reads {key}, which it does not narrow",
        f"layer.1 cannot be left out: others read {LAYER}.add_1, {key}",
    ]
    verify(graph)


def test_a_layer_without_a_residual_path_is_no_site(small):
    stream = f"{LAYER}.self_attn.o_proj"
    broken = small().replacing(
        replace(o, inputs=(stream,)) if o.name == f"{LAYER}.add" else o for o in small()
    )
    graph, reasons = without_shared(broken)
    assert "layer.1" not in graph.sites_by_name
    assert {"heads.1", "mlp.1", "layer.0", "layer.2"} <= set(graph.sites_by_name)
    assert reasons == ["layer.1 cannot be left out: no residual path leads through it"]


def test_reasons_of_many_layers_are_one_sentence(small):
    everywhere = [f"model.language_model.layers.{i}.add" for i in range(3)]
    broken = small().replacing(
        replace(o, inputs=o.inputs[1:]) if o.name in everywhere else o for o in small()
    )
    graph, reasons = without_shared(broken)
    assert not graph.sites_of("layer")
    assert len(reasons) == 1
    assert reasons[0].endswith("(and 2 layers more)")
