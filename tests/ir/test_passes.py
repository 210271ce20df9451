from dataclasses import dataclass, replace
from functools import cache

import pytest
from architectures import small_llava
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig

from planner.ir.cost import Workload, price, total
from planner.ir.cost.device_table import device
from planner.ir.errors import InputError
from planner.ir.graph_text import parse_graph, print_graph
from planner.ir.lowering import lower_config
from planner.ir.passes import (
    PASSES,
    DropDead,
    FuseNorm,
    FuseProjections,
    NarrowPatches,
    NarrowTokens,
    Specialise,
    run,
)
from planner.ir.verify import verify
from planner.plan import Plan, TokenStage
from planner.planning.compiler import narrowing
from planner.planning.pricing import Pricing
from planner.planning.selectors import PatchStage
from planner.planning.switches import SwitchSet, with_switches

STACK = "model.language_model.layers"


def plan_for(graph, **choices):
    return Plan(graph.name, graph.properties["fingerprint"], graph.layers, **choices)


def cost(graph, workload, kept=None, step=0):
    sizes = workload.decode(step, kept) if step else workload.prefill(kept)
    return total(price(o, graph, sizes) for o in graph)


def workload_for(graph, **sizes):
    return Workload.default(graph, text_tokens=sizes.pop("text_tokens", 24), **sizes)


# Heads and groups of layer 0 narrowed, layer 1 off, attention of layer 2 off, its MLP whole.
MIXED = {
    "layers_off": (1,),
    "heads": {0: (1,), 2: ()},
    "mlp": {0: (0, 2, 3)},
    "mlp_switches": {0: 4},
}
STAGES = (TokenStage(1, 8, 16, "fastv"), TokenStage(2, 3, 16))

# -- golden text ----------------------------------------------------------------------------------

PATCHES = (PatchStage(1, 9, 1, ((17, 17, 32), (1, 17, 17))), PatchStage(2, 4, 1))


@cache
def deep():
    """A LLaVA with four layers in its tower."""
    return lower_config(small_llava(vision_layers=4), "deep").graph


GOLDEN = {
    "specialise": (lambda g: g, lambda g: Specialise(plan_for(g, **MIXED))),
    "narrow-patches": (lambda g: deep(), lambda g: NarrowPatches(PATCHES)),
    "narrow-tokens": (lambda g: g, lambda g: narrowing(STAGES)),
    "drop-dead": (lambda g: g, lambda g: DropDead()),
    "fuse-projections": (DropDead().apply, lambda g: FuseProjections()),
    "fuse-norm": (
        lambda g: FuseProjections().apply(DropDead().apply(g)),
        lambda g: FuseNorm(),
    ),
}


def test_every_pass_has_golden_text():
    assert set(GOLDEN) == set(PASSES)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, golden, small):
    prepare, build = GOLDEN[name]
    before = prepare(small())
    step = build(before)
    assert step.name == name
    assert isinstance(step, PASSES[name])
    golden(f"{name}.before.txt", print_graph(before))
    golden(f"{name}.after.txt", print_graph(run(before, [step])))


# -- running passes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Breaks:
    name = "breaks"

    def apply(self, graph):
        return graph.replacing(graph.operators[1:])


def test_what_a_pass_leaves_is_verified(small):
    with pytest.raises(InputError, match="reads input, which does not exist"):
        run(small(), [DropDead(), _Breaks()])


def test_graphs_are_shown_between_passes(small):
    shown = []
    steps = (DropDead(), FuseProjections())
    result = run(small(), steps, lambda name, graph: shown.append((name, graph)))
    assert [name for name, _ in shown] == ["drop-dead", "fuse-projections"]
    assert shown[-1][1] == result
    assert shown[0][1] == DropDead().apply(small())


@pytest.mark.parametrize("name", GOLDEN)
def test_passes_leave_the_given_graph_alone(name, small):
    graph = GOLDEN[name][0](small())
    copy = parse_graph(print_graph(graph))
    GOLDEN[name][1](graph).apply(graph)
    assert graph == copy


# -- specialise, against the model that was built as narrow ---------------------------------------


def renumbered(graph, numbers):
    """Operators with layers renumbered, sites and narrowings left out."""
    text = print_graph(graph.replacing((replace(o, narrowed_by=()) for o in graph), ()))
    for old, new in numbers.items():
        text = text.replace(f"{STACK}.{old}.", f"{STACK}.{new}.")
        text = text.replace(f"in {STACK}.{old} ", f"in {STACK}.{new} ")
        text = text.replace(f"@decoder.{old}", f"@decoder.{new}")
    return parse_graph(text).operators


def test_a_layer_left_out_is_a_model_with_a_layer_less(small):
    cut = run(small(layers=4), [Specialise(plan_for(small(layers=4), layers_off=(0, 1)))])
    assert renumbered(cut, {2: 0, 3: 1}) == renumbered(small(layers=2), {})
    assert [s.name for s in cut.sites] == [
        f"{k}.{i}" for i in (2, 3) for k in ("layer", "heads", "mlp")
    ]


def test_the_last_layer_can_be_left_out(small):
    cut = run(small(layers=4), [Specialise(plan_for(small(layers=4), layers_off=(2, 3)))])
    assert renumbered(cut, {}) == renumbered(small(layers=2), {})


def test_all_layers_can_be_left_out(small):
    graph = small()
    cut = run(graph, [Specialise(plan_for(graph, layers_off=(0, 1, 2)))])
    assert not [o for o in cut if o.part == "decoder" and o.layer is not None]
    assert cut.by_name["model.language_model.norm"].inputs == ("model.language_model.input",)


@pytest.mark.parametrize("text_type", ["llama", "qwen3", "gemma2"])
def test_narrow_blocks_are_those_of_a_narrow_model(text_type, small):
    """Half of the groups and three quarters of the neurons: as built with that many."""
    graph = small(text_type=text_type, layers=2)
    every = range(2)
    plan = plan_for(
        graph,
        heads=dict.fromkeys(every, (1,)),
        mlp=dict.fromkeys(every, (0, 2, 3)),
        mlp_switches=dict.fromkeys(every, 4),
    )
    narrow = small(text_type=text_type, layers=2, heads=2, groups=1, neurons=72)
    cut = run(graph, [Specialise(plan)])
    assert cut.operators == tuple(replace(o, narrowed_by=()) for o in narrow)
    assert {s.kind for s in cut.sites} == {"layer"}


def kinds_of(graph, layer):
    return [o.kind for o in graph if o.part == "decoder" and o.layer == layer]


def test_an_empty_block_leaves_the_residual_stream_as_it_is(small):
    graph = small()
    plan = plan_for(graph, heads={0: ()}, mlp={1: ()}, mlp_switches={1: 4})
    cut = run(graph, [Specialise(plan)])
    assert kinds_of(cut, 0) == [
        "norm",
        "linear",
        "activation",
        "linear",
        "multiply",
        "linear",
        "add",
    ]
    stream = "model.language_model.input"
    assert cut.by_name[f"{STACK}.0.post_attention_layernorm"].inputs == (stream,)
    assert cut.by_name[f"{STACK}.0.add_1"].inputs == (stream, f"{STACK}.0.mlp.down_proj")
    assert kinds_of(cut, 1)[-2:] == ["linear", "add"]
    assert cut.by_name[f"{STACK}.2.input_layernorm"].inputs == (f"{STACK}.1.add",)
    assert "heads.0" not in cut.sites_by_name
    assert "mlp.1" not in cut.sites_by_name


def test_an_empty_layer_is_a_layer_left_out(small):
    graph = small()
    empty = plan_for(graph, heads={1: ()}, mlp={1: ()}, mlp_switches={1: 1})
    off = plan_for(graph, layers_off=(1,))
    assert Specialise(empty).apply(graph).operators == Specialise(off).apply(graph).operators


def test_an_empty_block_with_norms_around_it_goes_whole(small):
    """Gemma 2 normalises what a block adds: the norm of zero is zero, so it goes as well."""
    graph = small(text_type="gemma2", layers=2)
    plan = plan_for(graph, heads={0: ()}, mlp={0: ()}, mlp_switches={0: 1})
    assert kinds_of(run(graph, [Specialise(plan)]), 0) == []


def test_an_empty_block_leaves_its_bias(small):
    graph = small(attention_bias=True)
    cut = run(graph, [Specialise(plan_for(graph, heads={1: ()}))])
    assert kinds_of(cut, 1)[0] == "add"
    assert cut.by_name[f"{STACK}.1.add"].inputs == (f"{STACK}.0.add_1",)


def test_empty_blocks_that_run_side_by_side():
    """GPT-NeoX adds attention and MLP in one sum; here its attention has no bias, its MLP has."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GPTNeoXConfig(**sizes, intermediate_size=96, vocab_size=128, attention_bias=False)
    graph = lower_config(config, "parallel").graph
    body, last = "gpt_neox.layers.1", "gpt_neox.layers.0.add_1"
    mlp = f"{body}.mlp.dense_4h_to_h"

    def cut(**choices):
        return run(graph, [Specialise(plan_for(graph, **choices))]).by_name

    without_heads = cut(heads={1: ()})
    assert f"{body}.add" not in without_heads
    assert without_heads[f"{body}.add_1"].inputs == (mlp, last)
    without_mlp = cut(mlp={1: ()}, mlp_switches={1: 1})
    assert without_mlp[f"{body}.add"].inputs == (f"{body}.attention.dense",)
    without_both = cut(heads={1: ()}, mlp={1: ()}, mlp_switches={1: 1})
    assert f"{body}.add" not in without_both
    assert without_both[f"{body}.add_1"].inputs == (last,)


def test_a_plan_for_another_model_is_refused(small):
    plan = plan_for(small(layers=4), layers_off=(3,))
    with pytest.raises(InputError, match="the plan was made for"):
        run(small(), [Specialise(plan)])


def test_a_layer_that_cannot_be_left_out_is_named(small):
    graph = small()
    bare = graph.replacing(graph.operators, (s for s in graph.sites if s.name != "layer.1"))
    with pytest.raises(InputError, match="layer 1 of 'small' cannot be left out"):
        run(bare, [Specialise(plan_for(graph, layers_off=(1,)))])
    reader = replace(graph.by_name["lm_head"], name="probe", inputs=(f"{STACK}.1.mlp.multiply",))
    reader = reader.having(**{"in": 96})
    probed = graph.replacing((*graph.operators, reader))
    with pytest.raises(InputError, match=r"layer\.1 cannot be left out: others read"):
        run(probed, [Specialise(plan_for(graph, layers_off=(1,)))])
    cut = graph.replacing(
        replace(o, inputs=o.inputs[1:]) if o.name == f"{STACK}.1.add" else o for o in graph
    )
    with pytest.raises(InputError, match="no residual path leads through it"):
        run(cut, [Specialise(plan_for(graph, layers_off=(1,)))])


# -- random plans ---------------------------------------------------------------------------------

LAYERS, GROUPS, SWITCHES = 3, 2, 5


def kept(count):
    return st.sets(st.integers(0, count - 1)).map(lambda s: tuple(sorted(s)))


@st.composite
def plans(draw, selectors=("fastv", "uniform")):
    """Choices of a plan for a graph of `LAYERS` layers."""
    off = draw(kept(LAYERS))
    on = st.sampled_from([i for i in range(LAYERS) if i not in off] or [0])
    heads = draw(st.dictionaries(on, kept(GROUPS))) if len(off) < LAYERS else {}
    mlp = draw(st.dictionaries(on, kept(SWITCHES))) if len(off) < LAYERS else {}
    stages = []
    for layer in draw(st.sampled_from([(), (0,), (1,), (2,), (1, 2), (0, 1, 2)])):
        before = stages[-1].keep if stages else 16
        stages.append(
            TokenStage(layer, draw(st.integers(0, before)), 16, draw(st.sampled_from(selectors)))
        )
    return {
        "layers_off": off,
        "heads": heads,
        "mlp": mlp,
        "mlp_switches": dict.fromkeys(mlp, SWITCHES),
        "tokens": tuple(stages),
    }


def passes_for(plan):
    return [Specialise(plan), narrowing(plan.tokens)]


@settings(max_examples=60, deadline=None)
@given(choices=plans())
def test_a_specialised_graph_costs_what_the_plan_was_priced_at(choices, small):
    graph = with_switches(small(), SWITCHES)
    plan = plan_for(graph, **choices)
    workload = workload_for(graph)
    at = tuple(stage.layer for stage in plan.tokens)
    selector = plan.tokens[0].selector if plan.tokens else "uniform"
    plan = replace(plan, tokens=tuple(replace(s, selector=selector) for s in plan.tokens))
    switches = SwitchSet("all", ("tokens", "layers", "heads", "mlp"), "", at, selector)
    priced = Pricing(graph, workload, switches, device("v100")).cost_of(plan)
    narrow = run(graph, passes_for(plan))
    left = {stage.layer: stage.keep for stage in plan.tokens}
    assert cost(narrow, workload, left).flops == priced["flops"]
    assert cost(narrow, workload, left, workload.new_tokens).kv_bytes == priced["kv"]


@settings(max_examples=60, deadline=None)
@given(choices=plans(selectors=("uniform",)))
def test_the_order_of_passes_does_not_matter(choices, small):
    """Tokens and switches are independent; fusing before a plan leads to the same products."""
    graph = small()
    plan = plan_for(graph, **choices)
    cut = run(graph, passes_for(plan))
    assert run(graph, reversed(passes_for(plan))) == cut
    fused = [FuseProjections(), FuseNorm()]
    after = run(cut, [DropDead(), *fused])
    before = run(graph, [*fused, *passes_for(plan), DropDead()])
    workload = workload_for(graph)
    left = {stage.layer: stage.keep for stage in plan.tokens}
    assert cost(before, workload, left).flops == cost(after, workload, left).flops
    assert cost(before, workload, left).parameters == cost(after, workload, left).parameters


# -- tokens ---------------------------------------------------------------------------------------


def symbols_of(graph, name):
    return {symbol for dim in graph.by_name[name].shape for symbol in dim.symbols} - {"batch"}


def test_tokens_are_counted_apart_after_every_stage(small):
    graph = run(small(), [narrowing(STAGES)])
    for layer, count in ((0, "query"), (1, "query.1"), (2, "query.2")):
        assert symbols_of(graph, f"{STACK}.{layer}.self_attn.q_proj") == {count}
        keys = graph.by_name[f"{STACK}.{layer}.self_attn.attention"]["keys"]
        assert str(keys) == count.replace("query", "context")
    assert symbols_of(graph, "model.language_model.norm") == {"query.2"}
    assert symbols_of(graph, "lm_head") == set()
    chosen = graph.by_name["tokens.2"]
    assert (chosen["keep"], chosen["of"], str(chosen["before"])) == (3, 16, "query.1")
    # The stream has two readers in a layer, which see one choice.
    assert graph.by_name[f"{STACK}.2.add"].inputs[0] == "tokens.2"
    assert graph.by_name[f"{STACK}.2.input_layernorm"].inputs == ("tokens.2",)


def test_a_stage_at_layer_0_is_before_the_decoder(small):
    graph = run(small(), [NarrowTokens((TokenStage(0, 4, 16),))])
    assert graph.by_name["tokens.0"].inputs == ("model.language_model.input",)
    assert symbols_of(graph, "model.language_model.input") == {"query"}
    after = [o for o in graph if o.layer is not None and o.part == "decoder"]
    assert {s for o in after for s in symbols_of(graph, o.name)} == {"query.0"}


def naive_flops(graph, workload, stages):
    """Every operator priced with as many tokens as its layer sees."""
    flops = 0
    for operator in graph:
        tokens = workload.image_tokens
        behind = operator.part == "decoder" and "norm" in operator.name
        layer = operator.layer if operator.part == "decoder" else None
        layer = LAYERS if layer is None and behind else layer
        for stage in stages:
            if layer is not None and layer >= stage.layer:
                tokens = stage.keep
        sizes = replace(workload, image_tokens=tokens).prefill()
        sizes["images"] = workload.images
        flops += price(operator, graph, sizes).flops
    return flops


@given(
    stages=st.sampled_from([(0,), (1,), (0, 2), (0, 1, 2)]).flatmap(
        lambda layers: st.lists(st.integers(0, 16), min_size=len(layers), max_size=len(layers)).map(
            lambda keeps: tuple(
                TokenStage(layer, keep, 16)
                for layer, keep in zip(layers, sorted(keeps, reverse=True), strict=True)
            )
        )
    )
)
@settings(max_examples=40, deadline=None)
def test_fewer_tokens_cost_what_a_naive_count_says(stages, small):
    graph = small()
    workload = workload_for(graph)
    narrow = run(graph, [narrowing(stages)])
    left = {stage.layer: stage.keep for stage in stages}
    assert cost(narrow, workload, left).flops == naive_flops(graph, workload, stages)


def test_a_stage_at_a_layer_that_is_off_moves_to_the_next(small):
    graph = small()
    cut = run(graph, [Specialise(plan_for(graph, layers_off=(1,))), narrowing(STAGES[:1])])
    assert cut.by_name["tokens.1"].inputs == (f"{STACK}.0.add_1",)
    assert cut.by_name[f"{STACK}.2.input_layernorm"].inputs == ("tokens.1",)
    ends = run(graph, [Specialise(plan_for(graph, layers_off=(1, 2))), narrowing(STAGES[:1])])
    assert ends.by_name["model.language_model.norm"].inputs == ("tokens.1",)


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        ([(3, 8, 16)], "ascending layers below 3, not at 3"),
        ([(1, 8, 16), (1, 4, 16)], "ascending layers below 3, not at 1"),
        ([(1, 17, 16)], "layer 1 cannot keep 17 of 16 image tokens"),
        ([(1, 8, 16), (2, 9, 16)], "layer 2 cannot keep 9 of 8 image tokens"),
        ([(1, -1, 16)], "layer 1 cannot keep -1 of 16 image tokens"),
    ],
)
def test_stages_out_of_order_are_refused(stages, complaint, small):
    with pytest.raises(InputError, match=complaint):
        run(small(), [NarrowTokens(tuple(TokenStage(*s) for s in stages))])


# -- fewer patches --------------------------------------------------------------------------------


def naive_tower_flops(graph, workload, stages):
    """Every operator in front of the decoder, scaled to the patches that are left to it."""
    flops = sum(2 * rows * columns * inner for s in stages for rows, columns, inner in s.products)
    for operator in graph:
        if operator.part in ("vision", "projector"):
            embeds = operator.part == "vision" and operator.layer is None
            layer = 99 if operator.layer is None else operator.layer
            left = [s.keep for s in stages if s.layer <= layer and not embeds]
            cls, power = operator.part == "vision", 2 if operator.kind == "attention" else 1
            scale = ((left[-1] + cls) / (16 + cls)) ** power if left else 1
            flops += round(price(operator, graph, workload.prefill()).flops * scale)
    return flops


@pytest.mark.parametrize(
    "stages", [PATCHES, PATCHES[:1], (PatchStage(2, 1, 1),), (PatchStage(1, 16, 1),)]
)
def test_fewer_patches_cost_what_a_naive_count_says(stages):
    graph, load = deep(), workload_for(deep())
    narrow = run(graph, [NarrowPatches(stages)])
    front = [o for o in narrow if o.part in ("vision", "projector")]
    counted = total(price(o, narrow, load.prefill()) for o in front).flops
    assert counted == naive_tower_flops(graph, load, stages)
    behind = [o for o in narrow if o.part == "decoder" and o.layer is not None]
    assert behind == [o for o in graph if o.part == "decoder" and o.layer is not None]


@pytest.mark.parametrize(
    ("layers", "keeps", "complaint"),
    [
        ((0,), (8,), "ascending layers from 1 to 2 of the vision tower: 8 of 16 before layer 0"),
        ((3,), (8,), "8 of 16 before layer 3 cannot be"),
        ((1,), (17,), "17 of 16 before layer 1"),
        ((1, 2), (8, 9), "9 of 8 before layer 2"),
        ((2, 1), (8, 4), "4 of 8 before layer 1"),
        ((1,), (0,), "0 of 16 before layer 1"),
    ],
)
def test_patches_that_cannot_be_dropped_are_refused(layers, keeps, complaint):
    stages = tuple(PatchStage(k, keep, 1) for k, keep in zip(layers, keeps, strict=True))
    with pytest.raises(InputError, match=complaint):
        run(deep(), [NarrowPatches(stages)])


def test_text_models_have_no_tower(lowered):
    graph = lowered("qwen3")[1].graph
    with pytest.raises(InputError, match="no vision tower with a projector behind it"):
        run(graph, [NarrowPatches(PATCHES)])


# -- dead operators -------------------------------------------------------------------------------


def test_what_no_output_needs_is_dropped(small):
    graph = small()
    alive = run(graph, [DropDead()])
    gone = [o for o in graph if o.name not in alive.by_name]
    # The image features are those of the last but one layer of the vision encoder.
    assert {(o.part, o.layer) for o in gone} == {("vision", 1)}
    assert alive.sites == graph.sites
    assert run(alive, [DropDead()]) == alive


def test_sites_of_dead_operators_go_with_them(small):
    graph = small()
    head = replace(graph.by_name["lm_head"], inputs=(f"{STACK}.1.add_1",))
    shortcut = graph.replacing(head if o.name == "lm_head" else o for o in graph)
    alive = run(shortcut, [DropDead()])
    assert {s.name for s in alive.sites if s.layer == 2} == set()
    assert {s.name for s in alive.sites} == {s.name for s in graph.sites if s.layer < 2}


def test_a_model_without_a_head_ends_in_its_last_operator(small):
    graph = small()
    body = graph.replacing(o for o in graph if o.part != "head")
    assert run(body, [DropDead()]).operators[-1].name == "model.language_model.norm"


# -- fusing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_type", ["llama", "qwen3", "gemma2"])
def test_fusing_moves_fewer_bytes_for_the_same_products(text_type, small):
    graph = DropDead().apply(small(text_type=text_type, layers=2))
    workload = workload_for(graph)
    projected = run(graph, [FuseProjections()])
    folded = run(projected, [FuseNorm()])
    for step in (0, 3):
        base, middle, last = (cost(g, workload, None, step) for g in (graph, projected, folded))
        assert base.flops == middle.flops == last.flops
        assert base.parameters == middle.parameters == last.parameters
        assert base.kv_bytes == last.kv_bytes
        assert base.bytes > middle.bytes > last.bytes
    names = [o.name for o in folded if o.kind == "norm_linear" and o.layer == 1]
    assert names == [
        f"{STACK}.1.self_attn.q_proj+k_proj+v_proj",
        f"{STACK}.1.mlp.gate_proj+up_proj",
    ]
    assert folded.sites == graph.sites


def two_linears(source="%x", columns=64, bias=0, module="m.b"):
    """x -> a, b -> sum; the arguments are of b."""
    return parse_graph(
        f"""\
graph g
property decoder_layers 0
property dtype_bytes 2
property hidden_size 64
property image_tokens 0
%x = input() [batch, query, 64] @decoder
%y = elementwise(%x) [batch, query, 64] {{function=copy}} @decoder
%m.a = linear(%x) [batch, query, 32] {{bias=0, in=64, out=32}} in = @decoder
%b = linear({source}) [batch, query, 32] {{bias={bias}, in={columns}, out=32}} in {module} @decoder
%s = add(%m.a, %b) [batch, query, 32] @decoder
end
"""
    )


def test_two_linears_of_one_module_are_fused():
    graph = run(two_linears(), [FuseProjections()])
    assert [o.name for o in graph] == ["x", "y", "m.a+b", "s"]
    fused = graph.by_name["m.a+b"]
    assert (fused["count"], fused["out"], fused.module) == (2, 64, "m")
    assert graph.by_name["s"].inputs == ("m.a+b",)


@pytest.mark.parametrize(
    "changes",
    [{"source": "%y"}, {"columns": 32}, {"bias": 1}, {"module": "n.b"}, {"source": "%x, %y"}],
)
def test_linears_that_differ_are_not_fused(changes):
    """Another input, a part of it, a bias, another module."""
    graph = two_linears(**changes)
    verify(graph)
    assert run(graph, [FuseProjections()]) == graph


def test_a_norm_that_others_read_stays(small):
    """Unless projections are fused, the norms of a decoder layer have three readers, or two."""
    graph = small()
    folded = run(graph, [FuseNorm()])
    assert kinds_of(folded, 1) == kinds_of(graph, 1)
