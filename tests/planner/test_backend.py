"""torch.compile(backend="planner"): compiled models obey plans, and nothing is compiled again."""

import pytest
import torch
from compiled_models import EAGER, assert_near, compiled, family, logits, masked, mixed_plan
from families import cached
from hypothesis import HealthCheck, given, settings
from plans import dense_plan, plan_of, plans
from torch import nn
from torch._dynamo.utils import counters

import planner
from planner.ir.errors import InputError
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.skipping import obeying

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_it_is_registered_by_its_entry_point():
    assert "planner" in torch.compiler.list_backends()


# Plain, biases in the middle, biases at the end and no gate, norms behind blocks and windows.
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "phi", "gemma3"])
def test_compiled_models_equal_masked_ones_under_any_plan(name):
    built, graph = family(name)
    inputs = built.inputs(batch=2, before=(3, 6), images=0)
    model = compiled(built.model, budget=1.0)
    assert_near(logits(model, inputs), logits(built.model, inputs))
    graphs = counters["stats"]["unique_graphs"]

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(plans(graph))
    def check(plan):
        assert planner.budget(model, plan).plan == plan
        assert_near(logits(model, inputs), masked(built.model, graph, plan, inputs))

    check()
    assert counters["stats"]["unique_graphs"] == graphs
    planner.budget(model, dense_plan(graph))
    assert_near(logits(model, inputs), logits(built.model, inputs))


def test_a_hundred_budgets_and_plans_compile_nothing():
    built, graph = family("qwen3")
    inputs = built.inputs(batch=2)
    model = compiled(built.model, budget=0.5)
    seen = {logits(model, inputs).sum().item()}
    counted = {kind: dict(counts) for kind, counts in counters.items()}
    for change in range(100):
        value = 0.3 + change / 200 if change % 2 else plan_of(graph, heads={change % 3: (0,)})
        plan = planner.budget(model, value).plan
        if change % 2:
            assert plan.cost["flops"]["fraction"] <= value
        seen.add(logits(model, inputs).sum().item())
    assert {kind: dict(counts) for kind, counts in counters.items()} == counted
    assert len(seen) > 10


def test_under_inductor():
    built, graph = family("qwen3")
    inputs = built.inputs(batch=2, before=(3, 6))
    model = torch.compile(
        built.model, backend="planner", options={"budget": 1.0, "utilities": "prior"}
    )
    assert_near(logits(model, inputs), logits(built.model, inputs))
    for plan in (mixed_plan(graph), plan_of(graph, layers_off=(0, 1, 2))):
        planner.budget(model, plan)
        assert_near(logits(model, inputs), masked(built.model, graph, plan, inputs))
    assert counters["stats"]["unique_graphs"] == 1


def test_prompts_of_any_length_and_batches_of_any_size():
    built, graph = family("llava_onevision")
    model = torch.compile(built.model, backend="planner", dynamic=True, options=EAGER)
    plan = mixed_plan(graph)
    planner.budget(model, plan)
    for batch, before in ((2, (3, 6)), (3, (4,)), (2, (9, 2)), (4, (6, 7, 1, 2))):
        inputs = built.inputs(batch=batch, before=before, images=0)
        assert_near(logits(model, inputs), masked(built.model, graph, plan, inputs))
    assert counters["stats"]["unique_graphs"] == 1


def test_no_graph_break_is_added():
    built, _ = family("llava")
    inputs = built.inputs(batch=2, images=0)
    found = []
    for model in (torch.compile(built.model, backend="eager"), compiled(built.model)):
        torch.compiler.reset()
        counters.clear()
        logits(model, inputs)
        breaks = sum(counters["graph_break"].values())
        found.append((breaks, counters["stats"]["unique_graphs"]))
    assert found[1] == found[0]


def test_images():
    built, graph = family("llava")
    inputs = built.inputs(batch=2, before=(3, 6))
    plan = mixed_plan(graph)
    model = compiled(built.model)
    planner.budget(model, plan)
    assert_near(logits(model, inputs), masked(built.model, graph, plan, inputs))


def test_all_layers_are_rewritten_in_one_graph():
    built, graph = family("llava")
    rewritten = []

    @torch._dynamo.register_backend(name="keep_what_planner_left")
    def keep(graph_module, _):
        rewritten.append([str(node.target) for node in graph_module.graph.nodes])
        return graph_module

    logits(compiled(built.model, inner="keep_what_planner_left"), built.inputs(images=0))
    (targets,) = [targets for targets in rewritten if any("planner." in t for t in targets)]
    per_layer = {"project_rows": 4, "attend": 1, "project_columns": 2}
    for op, count in per_layer.items():
        assert targets.count(f"planner.{op}.default") == count * graph.layers


def test_while_nothing_is_left_out_the_captured_graph_itself_runs():
    built, graph = family("llava")
    inputs = built.inputs(images=0)
    ran = []

    @torch._dynamo.register_backend(name="note_what_runs")
    def note(graph_module, _):
        targets = {str(node.target) for node in graph_module.graph.nodes}
        ops = {target for target in targets if target.startswith("planner.")}

        def run(*inputs):
            ran.extend(ops or ["stock"])
            return graph_module(*inputs)

        return run

    model = compiled(built.model, inner="note_what_runs", budget=1.0)
    assert torch.equal(logits(model, inputs), logits(built.model, inputs))
    assert {*ran} == {"stock"}
    ran.clear()
    planner.budget(model, 0.5)
    logits(model, inputs)
    assert "planner.attend.default" in ran
    ran.clear()
    for full in (1.0, dense_plan(graph), plan_of(graph, heads={0: (0, 1)})):
        planner.budget(model, full)
        assert torch.equal(logits(model, inputs), logits(built.model, inputs))
    assert {*ran} == {"stock"}


def test_generating_with_a_cache_of_either_kind():
    built, graph = family("qwen3")
    inputs = built.inputs(batch=2, before=(3, 6))
    plan = mixed_plan(graph)
    options = {"max_new_tokens": 5, "do_sample": False}
    with obeying(built.model, graph, plan):
        expected = built.model.generate(**inputs, **options)
    try:
        built.model.compile(backend="planner", options=EAGER)
        planner.budget(built.model, plan)
        assert torch.equal(built.model.generate(**inputs, **options), expected)
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(built.model.generate(**inputs, **options, **static), expected)
    finally:
        built.model._compiled_call_impl = None


def test_a_prompt_that_the_stock_model_has_read():
    built, graph = family("qwen3")
    inputs = built.inputs(batch=2)
    plan = mixed_plan(graph)
    model = compiled(built.model)
    planner.budget(model, plan)
    word = torch.tensor([[5], [6]])
    found = []
    for run in (model, built.model):
        with torch.no_grad():
            cache = built.model(**inputs).past_key_values
            gates = Gates.of([plan if run is built.model else dense_plan(graph)], graph)
            with MaskedExecutor(built.model, graph).using(gates):
                found.append(run(input_ids=word, **cached(built.model, cache)).logits)
    assert_near(*found)


def test_a_plan_for_every_sample():
    built, graph = family("qwen3")
    inputs = built.inputs(batch=2, before=(3, 6))
    both = [mixed_plan(graph), plan_of(graph, layers_off=(0,), mlp={1: (0, 1, 2)})]
    model = compiled(built.model, samples=2)
    planner.budget(model, both)
    assert_near(logits(model, inputs), masked(built.model, graph, both, inputs))
    planner.budget(model, both[0])
    assert_near(logits(model, inputs), masked(built.model, graph, both[0], inputs))
    with pytest.raises(InputError, match="3 plans for graphs that take 2"):
        planner.budget(model, [*both, both[0]])
    assert_near(logits(model, inputs), masked(built.model, graph, both[0], inputs))


def test_gradients_reach_what_survives():
    built, graph = family("qwen3")
    inputs = built.inputs(batch=2)
    plan = mixed_plan(graph)
    model = compiled(built.model)
    planner.budget(model, plan)
    found = []
    try:
        for run in (model, built.model):
            with MaskedExecutor(built.model, graph).using(Gates.of([plan], graph)):
                run(**inputs, use_cache=False).logits.square().mean().backward()
            parameters = built.model.named_parameters()
            found.append({name: p.grad for name, p in parameters if p.grad is not None})
            built.model.zero_grad()
    finally:
        built.model.zero_grad()
    for name, want in found[1].items():
        assert torch.allclose(found[0][name], want, rtol=1e-4, atol=1e-5), name


def test_attention_that_no_op_runs_is_masked_and_said_so(logged):
    built, graph = family("qwen3")
    built.model.set_attn_implementation("eager")
    try:
        inputs = built.inputs(batch=2, before=(3, 6))
        model = compiled(built.model)
        plan = mixed_plan(graph)
        planner.budget(model, plan)
        assert_near(logits(model, inputs), masked(built.model, graph, plan, inputs))
    finally:
        built.model.set_attn_implementation("sdpa")
    assert len(logged()) == graph.layers
    assert "self_attn is masked, which saves no time" in logged()[0]


def test_a_model_inside_a_function_is_found():
    built, graph = family("qwen3")
    inputs = built.inputs()

    @torch.compile(backend="planner", options=EAGER)
    def doubled(model, inputs):
        return 2 * model(**inputs).logits

    plan = mixed_plan(graph)
    with pytest.raises(InputError, match="call it once"):
        planner.budget(built.model, plan)
    with torch.no_grad():
        doubled(built.model, inputs)
        planner.budget(built.model, plan)
        got = doubled(built.model, inputs)[inputs["attention_mask"].bool()]
    assert_near(got, 2 * masked(built.model, graph, plan, inputs))


def test_what_planner_does_not_know_is_compiled_as_it_is(logged):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.conv(x).relu().mean(dim=(2, 3)))

    net, x = Net(), torch.randn(2, 3, 8, 8)
    model = compiled(net)
    for images in (x, torch.cat([x, x])):
        torch.testing.assert_close(model(images), net(images))
    assert logged() == [
        "a graph belongs to no language model of transformers; inductor compiles it"
    ]
    with pytest.raises(InputError, match="holds no language model"):
        planner.budget(model, 0.5)


def test_a_model_that_cannot_be_lowered_runs_dense(logged):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        got = compiled(model)(pixel_values=pixels).logits
        torch.testing.assert_close(got, model(pixel_values=pixels).logits)
    assert len(logged()) == 1
    assert "ViTForImageClassification runs dense" in logged()[0]
