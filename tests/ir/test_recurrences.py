"""Recurrences and what chooses keys are priced at what the stock code runs, at any length."""

import functools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from planner.ir.cost import Workload
from planner.ir.cost.price import operator_flops
from planner.ir.dims import Dim
from planner.ir.graph import Operator
from planner.ir.lowering import lower_model
from planner.ir.lowering.recurrences import growth
from planner.models.checking.small_config import small_default

# Token by token; chunk by chunk, and all pairs of chunks; a delta rule beside attention; a state
# and attention in one layer; a state between layers with attention; keys that an indexer chooses.
TYPES = ("mamba", "mamba2", "qwen3_5_text", "falcon_h1", "jamba", "olmo_hybrid", "deepseek_v32")
# Less than a chunk of 16 or 64 tokens, just one, one and a token, several.
LENGTHS = (9, 16, 17, 64, 65, 150)


@functools.cache
def small_model(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_default(name)).eval().requires_grad_(False)
    graph = lower_model(model, name)
    model.set_attn_implementation("eager")
    if any(operator.kind == "experts" for operator in graph):
        # The counter does not see grouped products.
        model.set_experts_implementation("eager")
    return model, graph


@pytest.mark.parametrize("name", TYPES)
def test_layers_are_priced_as_they_run(name):
    model, graph = small_model(name)
    for tokens in LENGTHS:
        ids = torch.arange(2 * tokens).view(2, -1) % 300 + 3
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, logits_to_keep=1)
        sizes = Workload(0, tokens, batch=2).prefill()
        priced = sum(operator_flops(operator, sizes) for operator in graph)
        assert priced == counter.get_total_flops(), tokens


@pytest.mark.parametrize("chunk", [10, 16, 64, 100, 256])
def test_growth_is_found_by_counts_alone(chunk):
    def flops(tokens):
        chunks = math.ceil(tokens / chunk)
        return 7 + 3 * tokens + 50 * chunks + 11 * chunks**2

    assert growth(flops) == {
        "flops": 7,
        "flops_per_row": 3,
        "chunk": chunk,
        "flops_per_chunk": 50,
        "flops_per_chunk_pair": 11,
    }


@pytest.mark.parametrize("pair", [0, 5])
def test_growth_by_tokens_and_their_pairs(pair):
    found = growth(lambda tokens: 7 + 3 * tokens + pair * tokens**2)
    scan = Operator("scan", "scan", (), (Dim.of("batch"), Dim.of("query"), Dim(4))).having(**found)
    for tokens in (1, 100):
        sizes = {"batch": 2, "query": tokens, "context": tokens}
        assert operator_flops(scan, sizes) == 2 * (7 + 3 * tokens + pair * tokens**2)


def test_other_growth_is_not_taken_for_known():
    assert growth(lambda tokens: tokens**3) is None
    assert growth(lambda tokens: 5 * tokens + 2 * math.ceil(tokens / 16) ** 3) is None
    assert growth(lambda tokens: 1000 - tokens) is None


def test_a_step_of_decoding_takes_its_share_of_a_chunk():
    counts = {"flops": 9, "flops_per_row": 3, "chunk": 4, "flops_per_chunk": 40}
    scan = Operator("scan", "scan", (), (Dim.of("batch"), Dim.of("query"), Dim(4))).having(**counts)
    assert operator_flops(scan, {"batch": 2, "query": 9, "context": 9}) == 2 * (9 + 27 + 120)
    assert operator_flops(scan, {"batch": 2, "query": 1, "context": 10}) == 2 * (3 + 10)
