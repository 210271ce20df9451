"""Options and budgets of compiled models: several of a class, threads, what cannot obey."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from compiled_models import (
    assert_near,
    compiled,
    family,
    logits,
    masked,
    mixed_plan,
    of_another_class,
    quantised,
    twins,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import dense_plan, plan_of
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import planner
from planner.backend.captured_prompts import prompt_of
from planner.backend.compile_options import Options
from planner.ir.errors import InputError
from planner.ir.lowering.counted_flops import CountedFlops
from planner.models.running.skipping import session_on
from planner.plan import TokenStage

pytestmark = pytest.mark.usefixtures("fresh_compiler")


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
        ({"switches": ["layers"]}, "switches is ['layers']"),
        ({"switches": None}, "switches is None"),
        ({"mode": "nonsense"}, "mode is 'nonsense'"),
        ({"budget": b"1"}, "is not a number"),
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


def with_adapters(model, targets=("up_proj", "q_proj")):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets))).eval()


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
