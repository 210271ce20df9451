"""torch.compile(backend="planner"): compiled models obey plans, and nothing is compiled again."""

import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from families import FAMILIES, cached
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import dense_plan, plan_of, plans
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import planner
from planner.backend.captured_prompts import prompt_of
from planner.backend.compile_options import Options
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.running.counted_flops import CountedFlops
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.skipping import obeying, session_on
from planner.plan import TokenStage

TOLERANCE = 1e-5
# What is left is run as it is: these tests are of the rewriting, one below of inductor.
EAGER = {"inner": "eager", "utilities": "prior"}

_known = {}


def family(name):
    """A tiny model of three layers and its Graph; models are left as they were."""
    if name not in _known:
        built = FAMILIES[name]()
        # Compiling takes its time for each.
        text = built.model.config.get_text_config()
        text.num_hidden_layers = 3
        if vars(text).get("layer_types"):
            text.layer_types = text.layer_types[:3]
        del built.model.get_decoder().layers[3:]
        _known[name] = built, lower_model(built.model, name)
    return _known[name]


@pytest.fixture(autouse=True)
def _fresh():
    torch.set_num_threads(1)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def logged(caplog):
    """Messages of planner's own logger."""
    caplog.set_level(logging.INFO, logger="planner")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "planner"]


def compiled(model, **options):
    return torch.compile(model, backend="planner", options=EAGER | options)


def logits(model, inputs):
    """Of the tokens that are no padding."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def masked(model, graph, chosen, inputs):
    chosen = chosen if isinstance(chosen, list) else [chosen]
    with MaskedExecutor(model, graph).using(Gates.of(chosen, graph)):
        return logits(model, inputs)


def assert_near(got, want):
    assert got.shape == want.shape
    assert (got - want).norm() <= TOLERANCE * want.norm()


def mixed_plan(graph):
    """A layer off, heads and neurons off, one block with nothing left."""
    return plan_of(graph, layers_off=(1,), heads={0: (1,), 2: ()}, mlp={0: (0, 3, 4), 2: (6,)})


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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"budgt": 0.5}, "unknown option 'budgt': did you mean 'budget'?"),
        ({"wings": 2}, "unknown option 'wings': choose from budget,"),
        ({"budget": 1.5}, "at most 1"),
        ({"budget": [0.5, None]}, "budget"),
        ({"switches": "all"}, "drops no image tokens"),
        ({"switches": "wings"}, "unknown switches 'wings'"),
        ({"tokens": "fastv:k=2,r=0.5"}, "drops no image tokens"),
        ({"kv": "h2o"}, "evicts nothing"),
        ({"samples": 0}, "samples is 0"),
        ({"samples": True}, "samples is True"),
        ({"inner": "planner"}, "inner is 'planner'"),
        ({"inner": "nothing"}, "inner is 'nothing'"),
        ("fast", "give a dict"),
    ],
)
def test_bad_options(options, expected):
    with pytest.raises(InputError) as caught:
        Options.parse(options)
    assert expected in str(caught.value)


def test_bad_options_and_budgets_reach_the_user():
    built, graph = family("qwen3")
    inputs = built.inputs()
    with pytest.raises(BackendCompilerFailed, match="did you mean 'budget'"):
        logits(compiled(built.model, budgt=0.5), inputs)
    model = compiled(built.model, budget=0.6)
    stages = plan_of(graph, tokens=(TokenStage(1, 2, 4),))
    wrong = [
        (0, "more than 0"),
        (stages, "drops no image tokens"),
        ([dense_plan(graph), 0.5], "something else"),
        ([], "not a number"),
    ]
    for value, expected in wrong:
        with pytest.raises(InputError, match=expected):
            planner.budget(model, value)
    assert planner.budget(model, 0.7).plan is None
    logits(model, inputs)
    planner.budget(model, 0.5)
    before = logits(model, inputs)
    _, other = family("phi")
    wrong += [("latency=5ms", "device"), (dense_plan(other), "was made for")]
    for value, expected in wrong:
        with pytest.raises(InputError, match=expected):
            planner.budget(model, value)
    assert torch.equal(logits(model, inputs), before)


@st.composite
def _budgets(draw):
    return draw(st.integers(30, 100)) / 100


def test_budgets_are_kept():
    built, _ = family("qwen3")
    model = compiled(built.model, switches="layers,mlp", utilities="uniform")
    logits(model, built.inputs())

    @settings(max_examples=10, deadline=None)
    @given(_budgets())
    def check(budget):
        plan = planner.budget(model, budget).plan
        assert plan.cost["flops"]["fraction"] <= budget
        assert not plan.heads

    check()


# -- several models, threads, and the other way to run a plan --------------------------------------


def twins(name, count=2):
    """Models of one class with weights of their own; TorchDynamo compiles them once."""
    built, graph = family(name)
    return [copy.deepcopy(built.model) for _ in range(count)], graph, built.inputs(batch=2)


def test_models_of_one_class_have_budgets_of_their_own():
    (first, second, third), graph, inputs = twins("qwen3", 3)
    with torch.no_grad():
        second.model.layers[0].mlp.down_proj.weight.mul_(2)
    plan, other = mixed_plan(graph), plan_of(graph, heads={1: (0,)})
    one, two = compiled(first), compiled(second)
    planner.budget(one, plan)
    assert_near(logits(one, inputs), masked(first, graph, plan, inputs))
    planner.budget(two, other)
    assert_near(logits(two, inputs), masked(second, graph, other, inputs))
    planner.budget(one, 1.0)
    assert_near(logits(one, inputs), logits(first, inputs))
    assert_near(logits(two, inputs), masked(second, graph, other, inputs))
    # One that nobody has set a budget for has that of its options.
    three = compiled(third)
    assert not torch.equal(logits(three, inputs), logits(third, inputs))
    assert planner.plan_of(three).cost["flops"]["fraction"] <= 0.65
    assert counters["stats"]["unique_graphs"] == 1


def test_weights_of_a_compiled_model_may_be_exchanged():
    (model,), graph, inputs = twins("qwen3", 1)
    run, plan = compiled(model), mixed_plan(graph)
    planner.budget(run, plan)
    logits(run, inputs)
    state = {name: value * 0.9 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert_near(logits(run, inputs), masked(model, graph, plan, inputs))


def test_threads_call_a_compiled_model_under_plans_of_their_own():
    (model,), graph, inputs = twins("qwen3", 1)
    run = compiled(model)
    logits(run, inputs)
    chosen = [mixed_plan(graph), plan_of(graph, layers_off=(0,)), dense_plan(graph)]
    right = [masked(model, graph, plan, inputs) for plan in chosen]
    ready = threading.Barrier(len(chosen))

    def answer(number):
        torch.set_num_threads(1)
        with planner.budget(run, chosen[number]) as plan:
            assert plan is chosen[number]
            ready.wait()
            for _ in range(5):
                assert_near(logits(run, inputs), right[number])

    with ThreadPoolExecutor(len(chosen)) as pool:
        for done in [pool.submit(answer, number) for number in range(len(chosen))]:
            done.result()


def test_a_block_puts_back_what_held():
    (model,), graph, inputs = twins("qwen3", 1)
    run = compiled(model, budget=0.7)
    with planner.budget(run, mixed_plan(graph)) as nothing_yet:
        assert nothing_yet is None
        assert_near(logits(run, inputs), masked(model, graph, mixed_plan(graph), inputs))
        assert planner.plan_of(run) == mixed_plan(graph)
    plan = planner.plan_of(run)
    assert plan.cost["flops"]["fraction"] <= 0.7
    with planner.budget(run, 1.0):
        assert_near(logits(run, inputs), logits(model, inputs))
    assert_near(logits(run, inputs), masked(model, graph, plan, inputs))


def test_the_two_ways_to_run_a_plan_do_not_mix():
    (model,), graph, inputs = twins("qwen3", 1)
    planner.compile(model, plan=mixed_plan(graph))
    with pytest.raises(BackendCompilerFailed, match=r"planner\.compile has this model already"):
        logits(compiled(model), inputs)
    planner.restore(model)
    torch.compiler.reset()
    run = compiled(model)
    logits(run, inputs)
    with pytest.raises(InputError, match="has this model already"):
        planner.compile(model, 0.5)
    planner.restore(run)
    assert torch.equal(logits(run, inputs), logits(model, inputs))
    planner.compile(model, plan=mixed_plan(graph))
    assert_near(logits(model, inputs), masked(*twin_of(model), mixed_plan(graph), inputs))


def twin_of(model):
    """A stock model with the weights of one that obeys a plan, and its Graph."""
    twin = copy.deepcopy(model)
    planner.restore(twin)
    return twin, family("qwen3")[1]


def test_models_that_cannot_obey_get_no_budget():
    (model,), _, inputs = twins("qwen3", 1)
    with pytest.raises(InputError, match="not compiled"):
        planner.budget(model, 0.5)
    with pytest.raises(InputError, match="not compiled"):
        planner.budget(torch.compile(model, backend="eager"), 0.5)
    # A product that is read twice is none that a plan could narrow.
    inner = model.model.layers[1].mlp
    stock = inner.forward
    inner.forward = lambda x: stock(x) + 0 * inner.down_proj.weight.sum()
    run = compiled(model)
    assert_near(logits(run, inputs), logits(model, inputs))
    with pytest.raises(InputError, match="no one last product"):
        planner.budget(run, 0.5)


# -- what the backend cannot rewrite ---------------------------------------------------------------


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def with_adapters(model, targets=("up_proj", "q_proj")):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets))).eval()


def of_another_class(model):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in model.model.layers:
        layer.mlp.down_proj = Scaled(96, 64, bias=False)
        layer.self_attn.o_proj = Scaled(64, 64, bias=False)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [quantised, of_another_class, with_adapters])
def test_a_model_without_a_block_to_rewrite_gets_no_budget(change, logged):
    (model,), graph, inputs = twins("qwen3", 1)
    model = change(model)
    right = logits(model, inputs)
    run = compiled(model)
    assert_near(logits(run, inputs), right)
    assert any("runs dense" in message for message in logged())
    for value in (0.5, plan_of(graph, heads={0: (0,)})):
        with pytest.raises(InputError, match="no plan can be obeyed"):
            planner.budget(run, value)
    assert_near(logits(run, inputs), right)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_blocks_with_adapters_stay_whole():
    (model,), graph, inputs = twins("qwen3", 1)
    run = compiled(with_adapters(model, ["q_proj"]), budget=0.8)
    got = logits(run, inputs)
    plan = planner.plan_of(run)
    assert plan.mlp
    assert not plan.heads
    assert_near(got, masked(model, graph, plan, inputs))
    with pytest.raises(InputError, match=r"narrows heads\.0"):
        planner.budget(run, plan_of(graph, heads={0: (0,)}))


@torch.no_grad()
@pytest.mark.parametrize("side", [1, 2, 3])
def test_pictures_larger_than_the_captured_one_are_never_priced_too_low(side):
    built, graph = family("qwen2_5_vl")
    model = built.model
    session = session_on(copy.deepcopy(model), graph)
    config = model.config.vision_config
    per_run = graph.properties["image_tokens"]
    rows = side * round((per_run * config.spatial_merge_size**2) ** 0.5)
    patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(rows * rows, patch)
    with CountedFlops() as counter:
        model.get_image_features(pixels, torch.tensor([[1, rows, rows]]))
    ids = torch.full((1, side**2 * per_run + 3), 5)
    ids[:, 3:] = model.config.image_token_id
    priced = prompt_of(session, ids, pixels, 1).encoder_flops
    assert priced == counter.total if side == 1 else priced >= counter.total
