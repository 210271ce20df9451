"""torch.compile(backend="planner") on LLaVA-1.5-7B's own widths, with two layers of its decoder."""

import pytest
import torch
from plans import plan_of
from torch._dynamo.utils import counters
from transformers import LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

import planner
from planner.ir.lowering import lower_model
from planner.models.running.masked import Gates, MaskedExecutor
from planner.planning.catalog import find_model


@pytest.fixture(scope="module")
def llava():
    """The alias's config, with a small vocabulary and vision tower; random weights, bfloat16."""
    config = find_model("llava-7b").load_config()
    config.text_config.num_hidden_layers = 2
    config.text_config.vocab_size = 1024
    vision = config.vision_config
    vision.hidden_size, vision.intermediate_size, vision.image_size = 32, 64, 56
    vision.num_attention_heads = vision.num_hidden_layers = 2
    config.image_token_id = 1000
    torch.manual_seed(0)
    with no_init_weights():
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    # Drawing every weight would take the longest here. No row begins where another does.
    noise = 0.02 * torch.randn(1_000_003)
    for parameter in model.parameters():
        drawn = noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()]
        parameter.data.copy_(drawn.view_as(parameter) + (parameter.ndim == 1))
    return model, lower_model(model, "llava-7b")


def _logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.float()


PLANNER = {"inner": "eager", "budget": 0.8, "utilities": "prior"}


def _counted():
    return {kind: dict(counts) for kind, counts in counters.items()}


def test_one_graph_for_any_budget(llava):
    model, graph = llava
    ids = torch.randint(3, 1000, (1, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    found = []
    for backend, options in (("eager", {}), ("planner", PLANNER)):
        torch.compiler.reset()
        counters.clear()
        compiled = torch.compile(model, backend=backend, options=options or None)
        _logits(compiled, inputs)
        breaks = sum(counters["graph_break"].values())
        found.append((breaks, counters["stats"]["unique_graphs"]))
    assert found == [(0, 1), (0, 1)]
    before = _counted()
    plans = [
        plan_of(graph, heads={0: (3, *range(8, 30))}, mlp={1: (1, 2, 5)}),
        plan_of(graph, layers_off=(1,), heads={0: (31,)}),
    ]
    for plan in plans:
        planner.budget(compiled, plan)
        with MaskedExecutor(model, graph).using(Gates.of([plan], graph)):
            want = _logits(model, inputs)
        got = _logits(compiled, inputs)
        assert (got - want).norm() <= 2e-2 * want.norm()
    planner.budget(compiled, 1.0)
    assert torch.equal(_logits(compiled, inputs), _logits(model, inputs))
    for change in range(100):
        plan = planner.budget(compiled, 0.75 + change / 400).plan
        assert plan.cost["flops"]["fraction"] <= 0.75 + change / 400
        if change % 50 == 0:
            _logits(compiled, inputs)
    assert _counted() == before
    torch.compiler.reset()
