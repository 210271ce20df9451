"""Which equal head counts stock configs take, and that uniform plans keep to them."""

import pytest
from transformers import LlamaConfig, LlavaConfig, Qwen2Config, Qwen3Config

from planner.planning.compiler import compile_plan
from planner.planning.config_sizes import head_counts
from planner.planning.request import Request

SIZES = {"hidden_size": 96, "num_attention_heads": 12, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "groups", "expected"),
    [
        # Llama wants the number of heads to divide the hidden size.
        (LlamaConfig(**SIZES, num_key_value_heads=12), 12, (1, 2, 3, 4, 6, 8, 12)),
        (LlamaConfig(**SIZES, num_key_value_heads=4), 4, (1, 2, 4)),
        (LlavaConfig(), 32, (1, 2, 4, 8, 16, 32)),
        (Qwen2Config(**SIZES, num_key_value_heads=4), 4, (1, 2, 3, 4)),
        (Qwen3Config(**SIZES, num_key_value_heads=6), 6, (1, 2, 3, 4, 5, 6)),
    ],
    ids=["llama", "llama-gqa", "llava", "qwen2", "qwen3"],
)
def test_head_counts_that_a_stock_config_takes(config, groups, expected):
    before = config.to_dict()
    assert head_counts(config, groups) == expected
    assert config.to_dict() == before


@pytest.mark.parametrize("budget", [0.2, 0.35, 0.5])
def test_uniform_plans_keep_to_them(budget):
    request = Request("tiny-llava", budget=budget, switches="heads,mlp", uniform=True, scope="llm")
    result = compile_plan(request)
    kept = {result.plan.kept(site).count for site in result.graph.sites_of("heads")}
    assert len(kept) == 1
    assert kept <= {1, 2, 4, 8}
