"""The conventions reproduce the tables they stand behind, to the printed digit."""

import functools

import pytest
from transformers import LlamaConfig

from planner.ir.cost.conventions import CONVENTIONS, convention
from planner.ir.cost.device_table import device
from planner.ir.cost.workload import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Operator
from planner.ir.lowering import lower_config

LAYERS = {"7b": 32, "13b": 40}


@functools.cache
def llama(size):
    """Vicuna, the language model of LLaVA-1.5: the conventions read nothing of the vision side."""
    wider = {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    }
    return lower_config(LlamaConfig(**(wider if size == "13b" else {})), size).graph


def staged(size, *stages):
    """Tokens per layer from (layers, tokens) pairs; layers behind the last pair are off."""
    counts = [tokens for layers, tokens in stages for _ in range(layers)]
    return counts + [0] * (LAYERS[size] - len(counts))


# -- Dynamic-LLaVA (arXiv 2412.00876), Table 10 ----------------------------------------------------

# Size, tokens of the layers in turn, printed TFLOPs, and what the formula gives where it differs.
TABLE_10 = {
    # Printed without the square of 576, which would give 9.9; the result is that of the square.
    "LLaVA-1.5-7B": ("7b", [(32, 576)], "10.1"),
    "PruMerge+-7B": ("7b", [(32, 146)], "2.5"),
    "FastV-7B": ("7b", [(3, 576), (29, 144)], "3.2"),
    "VoCo-LLaMA-7B": ("7b", [(32, 128)], "2.2"),
    # Printed as 2.07 here, and as 2.0 in Tables 1, 11 and 12: those are right.
    "HiRED-7B": ("7b", [(32, 115)], "2.07", "1.98"),
    # Printed without the square of 576 in the first term.
    "Dynamic-LLaVA-7B": ("7b", [(2, 576), (30, 115)], "2.5"),
    "LLaVA-1.5-13B": ("13b", [(40, 576)], "19.6"),
    "PruMerge+-13B": ("13b", [(40, 146)], "4.9"),
    "FastV-13B": ("13b", [(3, 576), (37, 144)], "6.0"),
    "VoCo-LLaMA-13B": ("13b", [(40, 128)], "4.3"),
    "HiRED-13B": ("13b", [(40, 115)], "3.9"),
    "Dynamic-LLaVA-13B": ("13b", [(2, 576), (38, 115)], "4.7"),
    "TokenPacker-7B-144": ("7b", [(32, 144)], "2.5"),
    "TokenPacker-7B-64": ("7b", [(32, 64)], "1.1"),
    "TokenPacker-FastV-7B": ("7b", [(3, 144), (29, 72)], "1.4"),
    "Dynamic-LLaVA-TokenPacker-7B": ("7b", [(2, 144), (30, 57)], "1.1"),
    # The formula gives 4.8488: printed as if rounded twice, by way of 4.85.
    "TokenPacker-13B-144": ("13b", [(40, 144)], "4.9", "4.8"),
    "TokenPacker-13B-64": ("13b", [(40, 64)], "2.2"),
    "TokenPacker-FastV-13B": ("13b", [(3, 144), (37, 72)], "2.6"),
    "Dynamic-LLaVA-TokenPacker-13B": ("13b", [(2, 144), (38, 57)], "2.1"),
}


@pytest.mark.parametrize("row", TABLE_10)
def test_dynamic_llava_table_10(row):
    size, stages, printed, *ours = TABLE_10[row]
    cost = convention("dynamic-llava").cost(llama(size), staged(size, *stages))
    expected = ours[0] if ours else printed
    digits = len(expected.partition(".")[2])
    assert f"{cost.flops / 1e12:.{digits}f}" == expected


def test_dynamic_llava_counts_answers_as_prompts():
    """Table 13: 159 generated tokens are 2.75 T, 83 of them behind the second layer 1.51 T."""
    counts = staged("7b", (32, 159)), staged("7b", (2, 159), (30, 83))
    known = convention("dynamic-llava")
    dense, sparse = (known.cost(llama("7b"), tokens, decodes=True) for tokens in counts)
    # The paper's token counts are means over answers, rounded to whole tokens.
    assert dense.flops == pytest.approx(2.75e12, rel=0.005)
    assert sparse.flops == pytest.approx(1.51e12, rel=0.005)


# -- AdaLLaVA (arXiv 2503.10905), Table 1: LLM-Viewer on a V100 ------------------------------------

# A prompt of MME has 644.28 tokens on average, 576 of them of the image. Budgets of 100, 85 and
# 60 % are 32, 27 and 19 layers.
MEAN_PROMPT = 644.28


def on_v100(stages, prompt, layers):
    """(TFLOP, ms) of a mean prompt, interpolated between the whole prompts next to it."""
    low = int(prompt)
    costs = [
        convention("llm-viewer").cost(
            llama("7b"), staged("7b", *stages(tokens, layers)), device("v100")
        )
        for tokens in (low, low + 1)
    ]
    share = prompt - low
    flops, seconds = (
        (1 - share) * getattr(costs[0], name) + share * getattr(costs[1], name)
        for name in ("flops", "seconds")
    )
    return flops / 1e12, seconds * 1e3


def whole(tokens, layers):
    return [(layers, tokens)]


def fastv(tokens, layers):
    """K = 2, R = 0.5: half of the 576 image tokens go before the third layer."""
    return [(2, tokens), (layers - 2, tokens - 288)]


@pytest.mark.parametrize(
    ("stages", "prompt", "layers", "tflop", "ms"),
    [
        (whole, MEAN_PROMPT, 32, "8.6", "81"),
        (whole, MEAN_PROMPT, 27, "7.2", "69"),
        # The paper prints 49 ms, which is 60 % of 81.4 ms; 19 of 32 layers take 59.5 % of it.
        (whole, MEAN_PROMPT, 19, "5.1", "48"),
        # PruMerge+ leaves 164 image tokens on average.
        (whole, 232, 32, "3.0", "29"),
        (whole, 232, 27, "2.6", "24"),
        (whole, 232, 19, "1.8", "17"),
        (fastv, MEAN_PROMPT, 32, "4.9", "47"),
        (fastv, MEAN_PROMPT, 27, "4.2", "40"),
        (fastv, MEAN_PROMPT, 19, "3.0", "29"),
    ],
)
def test_adallava_table_1(stages, prompt, layers, tflop, ms):
    computed = on_v100(stages, prompt, layers)
    assert (f"{computed[0]:.1f}", f"{computed[1]:.0f}") == (tflop, ms)


def test_adallava_table_1_to_three_digits():
    figures = [on_v100(whole, MEAN_PROMPT, layers) for layers in (32, 27, 19)]
    assert [f"{tflop:.3f}" for tflop, _ in figures] == ["8.566", "7.228", "5.086"]
    assert [f"{ms:.1f}" for _, ms in figures] == ["81.4", "68.7", "48.4"]
    figures = [on_v100(fastv, MEAN_PROMPT, layers) for layers in (32, 27, 19)]
    assert [f"{tflop:.3f}" for tflop, _ in figures] == ["4.925", "4.194", "3.023"]
    tflop, ms = on_v100(whole, 232, 32)
    assert (f"{tflop:.2f}", f"{ms:.1f}") == ("3.03", "28.6")


@pytest.mark.parametrize("tokens", [140, 640, 2048])
@pytest.mark.parametrize("layers", [1, 19, 32])
def test_llm_viewer_closed_form_of_llama_7b(tokens, layers):
    """Linears are bound by arithmetic from 140 tokens on, everything else by memory."""
    counts = staged("7b", (layers, tokens))
    cost = convention("llm-viewer").cost(llama("7b"), counts, device("v100"))
    operations = layers * (404_824_064 * tokens + 16_544 * tokens**2) + 131_072_000
    assert cost.flops == operations
    arithmetic = 404_750_336 * tokens / 112e12
    memory = (122_880 * tokens + 256 * tokens**2) / 900e9
    head = 2 * (4096 * 32000 + 4096 + 32000) / 900e9
    assert cost.seconds == pytest.approx(layers * (arithmetic + memory) + head, rel=1e-12)
    assert head == pytest.approx(0.2914e-3, rel=1e-3)


def test_llm_viewer_at_640_tokens():
    seconds = {
        name: convention("llm-viewer").cost(llama("7b"), [640] * 32, device(name)).seconds
        for name in ("v100", "a100-40g")
    }
    assert f"{seconds['v100'] * 1e3:.2f}" == "80.83"
    assert f"{seconds['a100-40g'] * 1e3:.2f}" == "30.51"


# -- rows, decoding, batches -----------------------------------------------------------------------


def test_llm_viewer_rows_with_grouped_queries():
    """Each row by hand: 64 hidden, 4 heads of 16, 2 KV heads, MLP of 96, 128 words, S = 10."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    graph = lower_config(config, "tiny").graph
    rows = list(convention("llm-viewer").rows(graph, [10, 0]))
    costs = [(row.name, row.cost()) for row in rows]
    found = {".".join(name.split(".")[-2:]): (c.flops, c.bytes // 2) for name, c in costs}
    assert found == {
        "self_attn.q_proj": (2 * 64 * 64 * 10, 64 * 64 + 10 * (64 + 64)),
        "self_attn.k_proj": (2 * 64 * 32 * 10, 64 * 32 + 10 * (64 + 32)),
        "self_attn.v_proj": (2 * 64 * 32 * 10, 64 * 32 + 10 * (64 + 32)),
        "attention.qk": (2 * 100 * 64, 10 * 32 + 10 * 32 + 100 * 4),
        "attention.sv": (2 * 100 * 64, 100 * 4 + 10 * 32 + 10 * 64),
        "attention.softmax": (5 * 100 * 4, 2 * 100 * 4),
        "self_attn.o_proj": (2 * 64 * 64 * 10, 64 * 64 + 10 * (64 + 64)),
        "mlp.gate_proj": (2 * 64 * 96 * 10, 64 * 96 + 10 * (64 + 96)),
        "mlp.up_proj": (2 * 64 * 96 * 10, 64 * 96 + 10 * (64 + 96)),
        "mlp.down_proj": (2 * 64 * 96 * 10, 64 * 96 + 10 * (64 + 96)),
        "attention_norm": (7 * 640, 2 * 640),
        "mlp_norm": (7 * 640, 2 * 640),
        "attention_add": (640, 2 * 640),
        "mlp_add": (640, 2 * 640),
        "mlp_activation": (2 * 640, 3 * 640),
        "lm_head": (64 * 128, 64 * 128 + 64 + 128),
    }
    assert {row.layer for row in rows} == {0, None}


def test_llm_viewer_decodes_one_query_over_a_context():
    viewer = convention("llm-viewer")
    step = viewer.cost(llama("7b"), [641] * 32, device("v100"), decodes=True)
    longer = viewer.cost(llama("7b"), [642] * 32, device("v100"), decodes=True)
    # One more key: two products, five operations a score; keys and values read, scores thrice.
    assert longer.flops - step.flops == 32 * (4 * 4096 + 5 * 32)
    assert longer.bytes - step.bytes == 2 * 32 * (2 * 4096 + 4 * 32)
    assert longer.kv_bytes == 32 * 641 * 2 * 4096 * 2
    assert step.bound == "memory"
    # Weights dominate: 13.2 GB at 900 GB/s.
    assert step.seconds == pytest.approx(step.parameters * 2 / 900e9, rel=0.03)


def analysed(config, tokens, batch, decodes, peak, bandwidth):
    """(operations, bytes, seconds) by LLM-Viewer's own formulas, at 16 bits; decoding behind so
    many tokens."""
    d, m, words = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv_heads, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rows, narrow = (1 if decodes else tokens) * batch, kv_heads * h
    known, scores = tokens * batch * narrow, tokens * rows * heads
    linears = [(d, d)] * 2 + [(d, narrow)] * 2 + [(d, m)] * 2 + [(m, d)]
    layer = [(2 * i * o * rows, i * o + (i + o) * rows) for i, o in linears]
    layer += [
        (2 * rows * tokens * d, (rows * d if decodes else known) + known + scores),
        (2 * rows * tokens * d, scores + known + rows * d),
        (5 * scores, 2 * scores),
        *[(7 * rows * d, 2 * rows * d), (rows * d, 2 * rows * d)] * 2,
        (2 * rows * d, 3 * rows * d),
    ]
    head = (batch * d * words, d * words + d + words)
    counted = [*layer * config.num_hidden_layers, head]
    seconds = sum(max(ops / peak, 2 * moved / bandwidth) for ops, moved in counted)
    return sum(ops for ops, _ in counted), 2 * sum(moved for _, moved in counted), seconds


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_llm_viewer_to_all_digits(batch, decodes, kv_heads):
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
    )
    graph, chip = lower_config(config, f"grouped-{kv_heads}").graph, device("v100")
    viewer, load = convention("llm-viewer"), Workload(576, 68, 1, batch)
    if decodes:
        # The first step behind the prompt: it attends to the prompt alone.
        found = viewer.cost(graph, viewer.tokens(graph, load, step=1), chip, batch, decodes=True)
    else:
        found = viewer.cost(graph, viewer.tokens(graph, load), chip, batch)
    expected = analysed(config, 644, batch, decodes, 112e12, 900e9)
    assert (found.flops, found.bytes) == expected[:2]
    assert found.seconds == pytest.approx(expected[2], rel=1e-12)
    assert found.kv_bytes == batch * 3 * 644 * 2 * kv_heads * 64 * 2


def test_dynamic_llava_takes_image_tokens_or_those_of_the_answer():
    counting, load = convention("dynamic-llava"), Workload(576, 68, 159)
    graph = llama("7b")
    assert counting.tokens(graph, load, {2: 115}) == [576] * 2 + [115] * 30
    assert counting.tokens(graph, load, step=159) == [159] * 32


def test_bad_arguments():
    graph = llama("7b")
    for known in CONVENTIONS.values():
        with pytest.raises(InputError, match="32 decoder layers, but token counts are given for 3"):
            known.cost(graph, [1, 2, 3])
    with pytest.raises(InputError, match="takes no device"):
        convention("dynamic-llava").cost(graph, [1] * 32, device("v100"))
    routed = Operator("moe", "experts", part="decoder", layer=0)
    mixture = graph.replacing([*graph.operators, routed])
    with pytest.raises(InputError, match="no row for moe, of kind experts"):
        convention("llm-viewer").cost(mixture, [1] * 32)
    with pytest.raises(InputError, match="choose from llm-viewer, dynamic-llava"):
        convention("mine")
