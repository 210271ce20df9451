"""A compiled model obeys the plan that `plan_of` speaks of, or says that it cannot."""

import copy
import pickle

import peft
import pytest
import torch
from compiled_models import (
    EAGER,
    assert_near,
    compiled,
    logits,
    masked,
    mixed_plan,
    of_another_class,
    quantised,
    twins,
)
from plans import dense_plan, plan_of
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import planner
from planner.backend.compile_options import Options
from planner.backend.plan_tensors import PlanTensors
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.checking.architecture import randomised
from planner.models.checking.small_config import small_default
from planner.models.checking.small_prompt import prompts_of
from planner.models.running.session import Session
from planner.models.running.skipping import obeying

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


WRAPPED = {
    "weight norm": parametrizations.weight_norm,
    "the same weight": lambda x: parametrize.register_parametrization(x, "weight", nn.Identity()),
    "twice the weight": lambda x: parametrize.register_parametrization(x, "weight", Twice()),
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.3),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_weights_that_are_computed_obey(wrapped):
    (model,), graph, inputs = twins("qwen3", 1)
    for layer in model.model.layers:
        for linear in (layer.mlp.down_proj, layer.mlp.up_proj, layer.self_attn.o_proj):
            WRAPPED[wrapped](linear)
    run, plan = compiled(model), mixed_plan(graph)
    planner.budget(run, plan)
    assert_near(logits(run, inputs), masked(model, graph, plan, inputs))


# -- graphs that hold a part of a layer -----------------------------------------------------------


def by_part(model):
    for layer in model.model.layers:
        layer.mlp.compile(backend="planner", options=EAGER)
    return model


def with_breaks(model):
    stock = type(model.model.layers[0].mlp).forward

    def forward(self, x):
        torch._dynamo.graph_break()
        return stock(self, x)

    for layer in model.model.layers:
        layer.mlp.forward = forward.__get__(layer.mlp)
    return compiled(model)


@pytest.mark.parametrize("way", [by_part, with_breaks])
def test_layers_that_share_a_graph_obey_their_own_part_of_a_plan(way):
    (model,), graph, inputs = twins("qwen3", 1)
    run = way(model)
    logits(run, inputs)
    for plan in (plan_of(graph, mlp={0: (0,)}), plan_of(graph, mlp={2: (0, 5)})):
        planner.budget(model, plan)
        assert_near(logits(run, inputs), masked(model, graph, plan, inputs))
    state = {name: value * 0.9 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert_near(logits(run, inputs), masked(model, graph, plan, inputs))


# -- layers that do more than attention and an MLP ------------------------------------------------


@pytest.mark.parametrize(("name", "whole"), [("qwen2_moe", (0, 1, 2, 3)), ("deepseek_v3", (2, 3))])
def test_layers_with_experts_beside_an_mlp_stay_on(name, whole):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_default(name)).float().eval()
    graph = lower_model(randomised(model), name)
    session = Session(model, graph)
    runs = PlanTensors(session, Options.parse(EAGER)).graph.sites_by_name
    assert [n for n in range(4) if f"layer.{n}" not in runs] == list(whole)
    assert {f"heads.{n}" for n in range(4)} <= runs.keys()


# -- models that change after their first call ----------------------------------------------------


def with_adapters(model):
    config = peft.LoraConfig(target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).eval()


def in_place(model):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [with_adapters, in_place, of_another_class])
def test_a_plan_is_refused_once_its_linears_are_exchanged(change):
    (model,), graph, inputs = twins("qwen3", 1)
    run, plan = compiled(model), mixed_plan(graph)
    planner.budget(run, plan)
    logits(run, inputs)
    change(model)
    for _ in range(2):
        with pytest.raises(InputError, match="was plain when the model was compiled"):
            logits(run, inputs)
    with pytest.raises(InputError, match=r"call torch\.compiler\.reset"):
        planner.budget(run, plan)


# -- copies, wrappers, restored models ------------------------------------------------------------


def test_a_copy_of_a_compiled_model_takes_its_plan_along_and_waits_to_be_compiled():
    (model,), graph, inputs = twins("qwen3", 1)
    model.compile(backend="planner", options=EAGER)
    plan = mixed_plan(graph)
    planner.budget(model, plan)
    logits(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for ask in (planner.plan_of, lambda m: planner.budget(m, plan)):
            with pytest.raises(InputError, match="is not compiled"):
                ask(copied)
    copied.compile(backend="planner", options=EAGER)
    assert_near(logits(copied, inputs), masked(model, graph, plan, inputs))
    assert planner.plan_of(copied) == plan
    with pytest.raises(InputError, match="shallow copy"):
        planner.budget(copy.copy(model), 0.5)


def test_a_budget_after_restore_has_the_model_obey_again():
    (model,), graph, inputs = twins("qwen3", 1)
    run, plan = compiled(model), mixed_plan(graph)
    planner.budget(run, plan)
    logits(run, inputs)
    planner.restore(run)
    stock = copy.deepcopy(model)
    for other in (inputs, {**inputs, "use_cache": False}):
        assert_near(logits(run, other), logits(stock, other))
    planner.budget(run, plan)
    assert_near(logits(run, inputs), masked(stock, graph, plan, inputs))
    assert planner.plan_of(run) == plan


def test_a_model_has_one_set_of_options():
    (model,), _, inputs = twins("qwen3", 1)
    lean = compiled(model, budget=0.5)
    got = logits(lean, inputs)
    with pytest.raises(BackendCompilerFailed, match="compiled with other options already"):
        logits(compiled(model, budget=0.9), inputs)
    assert torch.equal(logits(lean, inputs), got)
    assert planner.plan_of(lean).cost["flops"]["fraction"] <= 0.5


def test_two_models_in_one_graph_are_refused():
    (first, second), _, inputs = twins("qwen3", 2)

    @torch.compile(backend="planner", options=EAGER)
    def both(inputs):
        return first(**inputs).logits + second(**inputs).logits

    with pytest.raises(BackendCompilerFailed, match="calls two language models"):
        both(inputs)


# -- graphs that cannot obey ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_graph_that_cannot_obey_is_refused_and_others_go_on():
    (model,), graph, inputs = twins("qwen3", 1)
    run, plan = compiled(model), mixed_plan(graph)
    planner.budget(run, plan)
    right = masked(model, graph, plan, inputs)
    assert_near(logits(run, inputs), right)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(InputError, match="has no one last product"):
        run(**inputs, use_cache=False)
    with planner.budget(run, dense_plan(graph)):
        run(**inputs, use_cache=False)
    model.gradient_checkpointing_disable()
    model.eval()
    assert_near(logits(run, inputs), right)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_reset_forgets_why_a_model_could_not_obey():
    (model,), graph, inputs = twins("qwen3", 1)
    run = compiled(model)
    model.gradient_checkpointing_enable()
    model.train()
    run(**inputs, use_cache=False)
    model.gradient_checkpointing_disable()
    model.eval()
    assert_near(logits(run, inputs), logits(model, inputs))
    for ask in (planner.plan_of, lambda m: planner.budget(m, 0.5)):
        with pytest.raises(InputError, match="has no one last product"):
            ask(run)
    torch.compiler.reset()
    planner.budget(run, mixed_plan(graph))
    assert_near(logits(run, inputs), masked(model, graph, mixed_plan(graph), inputs))


@pytest.mark.filterwarnings("ignore")
def test_a_budget_that_waited_in_vain_is_refused_at_the_call():
    (model,), _, inputs = twins("qwen3", 1)
    run = compiled(quantised(model))
    planner.budget(run, 0.5)
    for _ in range(2):
        with pytest.raises(BackendCompilerFailed, match="no plan can be obeyed"):
            logits(run, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    (model,), graph, inputs = twins("qwen3", 1)
    run, plan = compiled(model), mixed_plan(graph)
    planner.budget(run, plan)
    with torch.autocast("cpu", dtype):
        got, want = logits(run, inputs), masked(model, graph, plan, inputs)
    assert got.dtype == want.dtype
    assert (got - want).norm() <= 1e-2 * want.norm()


def test_what_passes_the_limit_of_recompilations_is_refused():
    (model,), graph, inputs = twins("qwen3", 1)
    run, plan = compiled(model), mixed_plan(graph)
    planner.budget(run, plan)
    with torch._dynamo.config.patch(recompile_limit=1):
        assert_near(logits(run, inputs), masked(model, graph, plan, inputs))
        for _ in range(2):
            with pytest.raises(InputError, match=r"torch\._dynamo\.config\.recompile_limit"):
                logits(run, {**inputs, "use_cache": False})
        assert_near(logits(run, inputs), masked(model, graph, plan, inputs))


def test_a_dozen_sets_of_options_are_within_the_limit():
    (model,), _, inputs = twins("qwen3", 1)
    for number in range(12):
        twin = copy.deepcopy(model)
        run = compiled(twin, budget=0.4 + number / 20)
        assert not torch.equal(logits(run, inputs), logits(model, inputs))


@torch.no_grad()
def test_a_prompt_is_one_however_it_is_given():
    (model,), _, _ = twins("qwen3", 1)
    run = compiled(model, budget="kv=40KiB", new_tokens=1)
    short, long = torch.full((1, 7), 5), torch.full((1, 200), 5)
    run(input_ids=long)
    right = planner.plan_of(run)
    run(input_ids=short)
    assert planner.plan_of(run) != right
    embedded = model.get_input_embeddings()(long)
    cropped = model(input_ids=long).past_key_values
    cropped.crop(-200)
    ways = [((long,), {}), ((), {"inputs_embeds": embedded})]
    ways.append(((), {"input_ids": long, "past_key_values": cropped}))
    for given, named in ways:
        run(input_ids=short)
        run(*given, **named)
        assert planner.plan_of(run) == right


def test_generation_by_a_language_model_inside_is_compiled_too_or_refused():
    torch.manual_seed(0)
    config = small_default("blip-2")
    model = randomised(AutoModelForImageTextToText.from_config(config).float().eval())
    prompt = prompts_of(model).of(12)
    told = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    told |= {"return_dict_in_generate": True, "output_logits": True}
    graph = lower_model(model, "blip-2")
    plan = plan_of(graph, heads={0: (0,)}, mlp={1: (0,)})
    with obeying(model, graph, plan):
        want = torch.stack(model.generate(**prompt, **told).logits)
    model.compile(backend="planner", options=EAGER)
    with pytest.raises(InputError, match=r"call model\.language_model\.compile"):
        planner.budget(model, plan)
    model.language_model.compile(backend="planner", options=EAGER)
    planner.budget(model, plan)
    assert_near(torch.stack(model.generate(**prompt, **told).logits), want)
    assert planner.plan_of(model) == plan


def test_a_model_that_a_compiled_function_finds_by_itself():
    (model,), graph, inputs = twins("qwen3", 1)
    plan, hidden = mixed_plan(graph), {"model": model}

    def call(inputs):
        return hidden["model"](**inputs).logits

    run = torch.compile(call, backend="planner", options=EAGER)
    want = masked(model, graph, plan, inputs)
    with torch.no_grad():
        run(inputs)
        planner.budget(model, plan)
        del model
        assert_near(run(inputs)[inputs["attention_mask"].bool()], want)


def test_a_copy_takes_along_nothing_that_a_reset_has_forgotten():
    (model,), _, inputs = twins("qwen3", 1)
    logits(compiled(model, budget=0.5), inputs)
    torch.compiler.reset()
    run = compiled(copy.deepcopy(model), budget=1.0)
    assert torch.equal(logits(run, inputs), logits(model, inputs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "the linears of all its blocks are Conv1D, not"),
        ("mamba2", "no attention block or MLP of it can be narrowed"),
        ("gemma3n_text", "has no layer, attention block or MLP to narrow"),
    ],
)
def test_a_model_without_anything_to_narrow_says_why(name, why):
    model = AutoModelForCausalLM.from_config(small_default(name)).float().eval()
    run = compiled(model)
    with torch.no_grad():
        run(input_ids=torch.full((1, 6), 5))
    with pytest.raises(InputError, match=why):
        planner.budget(run, 0.5)
