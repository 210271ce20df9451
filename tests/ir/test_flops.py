"""FLOPs, KV elements and parameters of a Graph are exactly those of the executed model."""

import functools

import pytest
import torch
from families import FAMILIES
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MambaConfig, MixtralConfig

from planner.ir.cost import Workload, price
from planner.ir.cost.price import operator_flops, operator_parameters
from planner.ir.kinds import kind_of
from planner.ir.lowering import lower_config, lower_model
from planner.ir.passes import Specialise
from planner.models.running.skipping import session_on
from planner.plan import Plan, TokenStage
from planner.planning.compiler import narrowing
from planner.planning.switches import with_switches

# CLIP; windowed vision attention; a pixel-shuffle projector; one KV head and a prefix that attends
# both ways; a sliding-window cache; parallel attention and a plain MLP; text alone, q and k norms.
DENSE = ("llava", "qwen2_5_vl", "internvl", "paligemma", "gemma3", "phi", "qwen3")
# Model and batch size.
PLANNED = (("llava", 2), ("qwen2_5_vl", 1), ("internvl", 2), ("phi", 1), ("qwen3", 2))
NEW_TOKENS = 2


@functools.cache
def prepared(name):
    """A tiny random model that runs eager attention, and its Graph."""
    family = FAMILIES[name]()
    if name == "qwen2_5_vl":
        # Images of any size fit; the Graph is of the one that the config names.
        family.model.config.vision_config.image_size = 32
    graph = with_switches(lower_model(family.model, name), groups=8)
    family.model.set_attn_implementation("eager")
    # Counting hooks onto gradients where there are any.
    family.model.requires_grad_(False)
    return family, graph


def run(family, batch, new_tokens):
    """(FLOPs, elements in the cache) of the stock `generate`: a prefill and decode steps."""
    inputs = family.inputs(batch=batch)
    # The counter knows the product that adds to a sum, but not by its name for doing it in place.
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter:
        output = family.model.generate(
            **inputs, max_new_tokens=1 + new_tokens, do_sample=False, return_dict_in_generate=True
        )
    layers = output.past_key_values.layers
    caches = [(c.keys, c.values) for c in layers if getattr(c, "keys", None) is not None]
    return counter.get_total_flops(), sum(k.numel() + v.numel() for k, v in caches)


def workload_of(family, graph, batch):
    prompt = family.inputs(batch=batch)["input_ids"].shape[1]
    text = prompt - family.image_tokens
    return Workload.default(graph, family.image_tokens, text, NEW_TOKENS, batch)


def predicted(graph, workload, new_tokens, kept=None):
    """The same from the Graph."""
    steps = [workload.prefill(kept)]
    steps += [workload.decode(step, kept) for step in range(1, new_tokens + 1)]
    flops = sum(operator_flops(operator, sizes) for sizes in steps for operator in graph)
    return flops, sum(kind_of(operator).cached(operator, steps[-1]) for operator in graph)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", DENSE)
def test_dense_prefill_and_decode_to_the_last_flop(name, batch):
    family, graph = prepared(name)
    workload = workload_of(family, graph, batch)
    for new_tokens in (0, NEW_TOKENS):
        assert predicted(graph, workload, new_tokens) == run(family, batch, new_tokens)


def plans_of(name, graph, image_tokens):
    """Two plans: heads and groups narrowed or wholly off; a layer off and image tokens dropped."""
    facts = {"model": name, "fingerprint": graph.properties["fingerprint"], "layers": graph.layers}
    lanes = graph.sites_by_name["heads.0"].lanes
    yield Plan(
        **facts,
        heads={0: tuple(range(1, lanes)), 1: ()},
        mlp={0: (0, 2, 5), 1: (7,), 2: ()},
        mlp_switches={0: 8, 1: 8, 2: 8},
    )
    stages = (TokenStage(2, 9, image_tokens, "fastv"), TokenStage(3, 5, image_tokens, "uniform"))
    yield Plan(
        **facts,
        layers_off=(0,),
        heads={2: (0,)},
        mlp={1: (1, 2)},
        mlp_switches={1: 8},
        tokens=stages if image_tokens else (),
    )


@pytest.mark.parametrize(("name", "batch"), PLANNED)
def test_under_a_plan_to_the_last_flop(name, batch):
    family, graph = prepared(name)
    workload = workload_of(family, graph, batch)
    session = session_on(family.model, graph)
    base = predicted(graph, workload, NEW_TOKENS)
    for plan in plans_of(name, graph, family.image_tokens):
        narrow = narrowing(plan.tokens).apply(Specialise(plan).apply(graph))
        kept = {stage.layer: stage.keep for stage in plan.tokens}
        for new_tokens in (0, NEW_TOKENS):
            with session.under(plan):
                measured = run(family, batch, new_tokens)
            assert predicted(narrow, workload, new_tokens, kept) == measured
        assert predicted(narrow, workload, NEW_TOKENS, kept) < base
    # Afterwards the model is the base model again.
    assert run(family, batch, NEW_TOKENS) == base


@pytest.mark.parametrize("name", DENSE)
def test_parameters_but_those_added_to_activations(name):
    family, graph = prepared(name)
    # A pooling head asks with one learned query.
    added = ("position_embedding", "class_embedding", "cls_token", "lambda_", "head.probe")
    # LLaVA reads CLIP before its last norm.
    unused = ("vision_tower.post_layernorm",) if name == "llava" else ()
    names = (*added, *unused)
    expected = sum(
        parameter.numel()
        for path, parameter in family.model.named_parameters()
        if not any(name in path for name in names)
    )
    assert sum(map(operator_parameters, graph)) == expected


def test_experts_are_counted_for_the_rows_routed_to_them():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    graph = lower_model(model, "mixtral")
    model.set_attn_implementation("eager")
    # Grouped products are invisible to the counter, one expert after another is not.
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(0, 128, (2, 9)), logits_to_keep=1)
    flops, _ = predicted(graph, Workload(0, 9, batch=2), 0)
    assert flops == counter.get_total_flops()
    assert any(operator.kind == "experts" for operator in graph)
    assert sum(map(operator_parameters, graph)) == model.num_parameters()


def test_state_space_models_are_priced():
    config = MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2)
    graph = lower_config(config, "mamba").graph
    sizes = Workload(0, 9).prefill()
    scans = [operator for operator in graph if operator.kind == "scan"]
    assert scans
    assert all(operator_flops(operator, sizes) > 0 for operator in scans)
    assert all(price(operator, graph, sizes).bytes > 0 for operator in scans)
