import copy
import re

import networkx as nx
import pytest
import torch
from architectures import ARCHITECTURES, PECULIAR, TEXT_ONLY, peculiar
from families import FAMILIES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig

from planner.ir.cost import Workload, price, total
from planner.ir.dims import Dim
from planner.ir.graph_text import fingerprint, parse_graph, print_graph
from planner.ir.lowering import NotLowered, lower_config, lower_model
from planner.ir.lowering.describing import Markers
from planner.ir.verify import verify

EVERY = {**ARCHITECTURES, **TEXT_ONLY}


@pytest.mark.parametrize("name", EVERY)
def test_graphs_are_sound_and_round_trip(name, lowered):
    graph = lowered(name)[1].graph
    verify(graph)
    text = print_graph(graph)
    assert parse_graph(text) == graph
    assert print_graph(parse_graph(text)) == text
    assert graph.properties["fingerprint"] == fingerprint(graph)


@pytest.mark.parametrize("name", EVERY)
def test_sites_are_found_in_every_layer(name, lowered):
    expected, result = lowered(name)
    graph = result.graph
    assert graph.layers == expected.layers
    every = list(range(expected.layers))
    heads, mlps = graph.sites_of("heads"), graph.sites_of("mlp")
    assert [s.layer for s in heads] == (every if expected.groups else [])
    assert [s.layer for s in mlps] == (every if expected.neurons else [])
    assert {s.lanes for s in heads} <= {expected.groups}
    assert {s.lanes for s in mlps} <= {expected.neurons}
    assert [s.layer for s in graph.sites_of("layer")] == every


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_vision_side_feeds_the_decoder(name, lowered):
    expected, result = lowered(name)
    graph = result.graph
    (pixels,) = (o for o in graph if o.kind == "input" and o.part != "decoder")
    (head,) = (o for o in graph if o.part == "head")
    assert head.shape[-2].constant == 1
    for part in ("vision", "decoder"):
        attention = [o for o in graph if o.kind == "attention" and o.part == part]
        assert len({o.layer for o in attention}) > 1
    assert nx.has_path(graph.network, pixels.name, head.name)
    assert graph.properties["image_tokens"] == expected.image_tokens
    if expected.at_odds:
        (note,) = result.notes
        assert expected.at_odds in note
    else:
        assert not result.notes
    if "projector was not captured" not in expected.at_odds:
        projector = [o for o in graph if o.part == "projector" and o.kind == "linear"]
        assert all(nx.has_path(graph.network, o.name, head.name) for o in projector)
        assert projector


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_text_models_have_no_vision_side(name, lowered):
    graph = lowered(name)[1].graph
    assert {o.part for o in graph} == {"decoder", "head"}
    assert graph.properties["image_tokens"] == 0


def operators_of_layer(graph, kind, layer=0):
    return [o for o in graph if o.part == "decoder" and o.layer == layer and o.kind == kind]


def leaves(operators):
    return [o.module.rpartition(".")[2] for o in operators]


@pytest.mark.parametrize(
    ("name", "projections", "activations"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 1),
        ("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], 1),
        ("opt", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], 1),
        ("gpt_neox", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], 1),
    ],
)
def test_fused_and_plain_blocks(name, projections, activations, lowered):
    graph = lowered(name)[1].graph
    linears = operators_of_layer(graph, "linear")
    assert leaves(linears) == projections
    assert len(operators_of_layer(graph, "activation")) == activations
    narrowed = [o for o in linears if o.narrowed_by]
    assert narrowed == linears


def test_norms_of_queries_and_keys_narrow_with_the_heads(lowered):
    graph = lowered("qwen3")[1].graph
    norms = [o for o in operators_of_layer(graph, "norm") if o.narrowed_by]
    assert leaves(norms) == ["q_norm", "k_norm"]
    assert {o.narrowed_by for o in norms} == {(("shape.2", "heads.0"),)}


def test_grouped_queries_narrow_by_groups(lowered):
    graph = lowered("mixtral")[1].graph
    (attention,) = operators_of_layer(graph, "attention")
    assert (attention["heads"], attention["kv_heads"]) == (32, 8)
    site = graph.sites_by_name["heads.0"]
    widths = {b.module.rpartition(".")[2]: b.blocks[0].width for b in site.bindings}
    assert widths == {"q_proj": 512, "k_proj": 128, "v_proj": 128, "o_proj": 512}


def test_interleaved_projections_are_told_apart(lowered):
    site = lowered("gpt_neox")[1].graph.sites_by_name["heads.0"]
    fused = site.bindings[0]
    assert [b.offset for b in fused.blocks] == [0, 96, 192]
    assert {b.stride for b in fused.blocks} == {288}


def test_experts_and_recurrences_are_priced_without_sites(lowered):
    for name, kind in (("mixtral", "experts"), ("mamba", "scan")):
        graph = lowered(name)[1].graph
        operators = [o for o in graph if o.kind == kind]
        assert {o.layer for o in operators} == set(range(graph.layers))
        assert not any(o.narrowed_by for o in operators)
        sizes = Workload(0, text_tokens=10).prefill()
        assert total(price(o, graph, sizes) for o in operators).flops > 0


def test_a_state_space_layer_is_a_few_operators(lowered):
    graph = lowered("mamba")[1].graph
    kinds = [o.kind for o in graph if o.layer == 5]
    assert kinds == ["norm", "linear", "scan", "linear", "matmul", "scan", "linear", "add"]


def test_layers_that_are_alike_are_copies(lowered):
    """Captured once, expanded by copying: operators of two layers differ by the index alone."""
    graph = lowered("llama")[1].graph

    def body(layer):
        text = print_graph(graph.replacing([o for o in graph if o.layer == layer], ()))
        text = text[text.index("\n%") :]
        inside = re.sub(rf"(layers|heads|mlp|decoder)\.{layer}\b", r"\1.N", text)
        return re.sub(r"%\S*(layers\.\d+\.add_1|input)\b", "%stream", inside)

    assert body(3) == body(30) == body(1)


# -- sites against real weights -------------------------------------------------------------------


def narrowed_linear(linear, out, columns):
    """The linear with some rows and columns of its weight, in their old order."""
    rows = sorted(out) if out is not None else range(linear.out_features)
    kept = sorted(columns) if columns is not None else range(linear.in_features)
    small = nn.Linear(len(kept), len(rows), bias=linear.bias is not None)
    with torch.no_grad():
        small.weight.copy_(linear.weight[list(rows)][:, list(kept)])
        if linear.bias is not None:
            small.bias.copy_(linear.bias[list(rows)])
    return small


@pytest.fixture(scope="module")
def tiny_graph():
    """Family name -> (its tiny model, the model's Graph)."""
    cache = {}

    def get(name):
        if name not in cache:
            model = FAMILIES[name]().model
            cache[name] = (model, lower_model(model, name))
        return cache[name]

    return get


def features_of(binding, lanes):
    """Feature numbers of the given lanes, block by block."""
    starts = [(block.offset + lane * block.stride, block.width)
              for block in binding.blocks for lane in lanes]  # fmt: skip
    return [feature for start, width in starts for feature in range(start, start + width)]


@pytest.mark.parametrize("name", FAMILIES)
def test_bindings_divide_the_weights_of_a_real_model(name, tiny_graph):
    model, graph = tiny_graph(name)
    verify(graph)
    text = model.config.get_text_config(decoder=True)
    assert graph.layers == text.num_hidden_layers
    for layer in range(graph.layers):
        heads, mlp = graph.sites_by_name[f"heads.{layer}"], graph.sites_by_name[f"mlp.{layer}"]
        assert heads.lanes == text.num_key_value_heads
        assert mlp.lanes == text.intermediate_size
        for site in (heads, mlp):
            assert model.get_submodule(site.module) is not None
            for binding in site.bindings:
                weight = model.get_submodule(binding.module).weight
                size = weight.shape[0 if binding.axis == "out" else 1]
                lanes = [features_of(binding, [lane]) for lane in range(site.lanes)]
                assert len({len(lane) for lane in lanes}) == 1
                assert sorted(f for lane in lanes for f in lane) == list(range(size))


@pytest.mark.parametrize("name", FAMILIES)
def test_switching_lanes_off_is_zeroing_what_they_compute(name, tiny_graph):
    """Stock modules with narrowed weights compute what the base model does with lanes silenced.

    A lane is silenced by zeroing its columns in the block's last linear; where the bindings named
    features of another lane, or missed one, the two would differ.
    """
    model, graph = tiny_graph(name)
    family = FAMILIES[name]()
    inputs = family.inputs(batch=2)
    for kind in ("heads", "mlp"):
        site = graph.sites_by_name[f"{kind}.1"]
        kept = [lane for lane in range(site.lanes) if lane % 3 != 1] or [0]
        off = [lane for lane in range(site.lanes) if lane not in kept]
        silenced, narrowed = copy.deepcopy(model), copy.deepcopy(model)
        for binding in site.bindings:
            linear = silenced.get_submodule(binding.module)
            features = features_of(binding, kept)
            if binding.axis == "in":
                with torch.no_grad():
                    linear.weight[:, features_of(binding, off)] = 0
            out = features if binding.axis == "out" else None
            columns = features if binding.axis == "in" else None
            narrowed.set_submodule(binding.module, narrowed_linear(linear, out, columns))
        with torch.no_grad():
            expected = silenced(**inputs).logits
            base = model(**inputs).logits
            result = narrowed(**inputs).logits
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        if off:
            assert (base - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", PECULIAR)
def test_heads_are_found_however_they_are_laid_out(name):
    """Heads whose rows are zeroed in every projection add nothing to the residual stream.

    Had a binding named rows of a head that is kept, the logits would change; had it missed rows of
    the values, the head would still speak.
    """
    model, groups = peculiar(name)
    graph = lower_model(model, name)
    for layer in range(2):
        assert graph.sites_by_name[f"heads.{layer}"].lanes == groups
        assert graph.sites_by_name[f"mlp.{layer}"].lanes == 96
    tokens = torch.arange(3, 17)[None]
    for kind, on in (("heads", [groups - 1]), ("mlp", range(0, 96, 3))):
        site = graph.sites_by_name[f"{kind}.1"]
        off = [lane for lane in range(site.lanes) if lane not in on]
        silenced, zeroed = copy.deepcopy(model), copy.deepcopy(model)
        with torch.no_grad():
            for binding in site.bindings:
                features = features_of(binding, off)
                if binding.axis == "in":
                    silenced.get_submodule(binding.module).weight[:, features] = 0
                else:
                    linear = zeroed.get_submodule(binding.module)
                    linear.weight[features] = 0
                    if linear.bias is not None:
                        linear.bias[features] = 0
            base, expected, result = (
                net(input_ids=tokens, use_cache=False).logits for net in (model, silenced, zeroed)
            )
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        assert (base - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3", "llama4"])
def test_products_of_peculiar_attention_are_all_counted(name):
    model, _ = peculiar(name)
    model.set_attn_implementation("eager")
    graph = lower_model(model, name)
    kinds = {o.kind for o in graph if o.layer == 0}
    assert "attention" in kinds
    assert not kinds & {"matmul", "softmax"}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(input_ids=torch.arange(3, 17)[None], use_cache=False, logits_to_keep=1)
    sizes = Workload(0, text_tokens=14).prefill()
    assert total(price(o, graph, sizes) for o in graph).flops == counter.get_total_flops()


def test_a_lowered_model_is_its_lowered_config(tiny_graph):
    model, graph = tiny_graph("llava")
    again = lower_config(model.config, "llava").graph
    assert again.operators == graph.operators
    assert again.sites == graph.sites


def test_a_model_without_a_decoder_says_so():
    with pytest.raises(NotLowered, match="'clip_vision_model' cannot be built from its config"):
        lower_config(CLIPVisionConfig(), "encoder")


def test_prices_are_those_of_the_model(lowered):
    """Parameters of the 7B decoder and lm_head, and prefill FLOPs, in closed form."""
    graph = lowered("llava-1.5-7b")[1].graph
    inside = [o for o in graph if o.part in ("decoder", "head")]
    tokens = 640
    sizes = Workload(576, text_tokens=64, image_tokens_per_run=576).prefill()
    costs = total(price(o, graph, sizes) for o in inside)
    block = 4 * 4096**2 + 3 * 4096 * 11008
    assert costs.parameters == 32 * (block + 2 * 4096) + 4096 + 2 * 32000 * 4096
    attention = 4 * tokens * tokens * 4096
    assert costs.flops == 32 * (2 * tokens * block + attention) + 2 * 4096 * 32000


def test_sizes_of_what_does_not_enter_are_no_counts_of_tokens():
    """Of a decoder with nothing beside its tokens, whatever sizes its features have."""
    alone = Markers(11)
    assert [str(alone.count(size)) for size in (11, 22, 13, 24)] == [
        "query", "2*query", "None", "None"
    ]  # fmt: skip
    assert [alone.keys(size) for size in (11, 24)] == [Dim.of("context"), 24]
    beside = Markers(11, 13)
    assert [str(beside.count(size)) for size in (11, 26, 24, 7)] == [
        "query", "2*encoding", "encoding+query", "None"
    ]  # fmt: skip
    assert [str(beside.keys(size)) for size in (11, 13, 24, 7)] == [
        "context", "encoded", "context+encoded", "7"
    ]  # fmt: skip
    assert Markers().keys(0) == 0
