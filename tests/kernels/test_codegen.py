"""Generated sources: golden text, and what they compute, interpreted, against float64."""

import ast
import dataclasses
import importlib.util
import itertools

import pytest
import torch
from blocks import (
    assert_close,
    cast,
    kept_positions,
    poisoned_cache,
    random_angles,
    random_attention,
    random_lanes,
    random_mlp,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.kernels import naive
from planner.kernels.codegen import Origin, generate
from planner.kernels.interpreter import interpreting
from planner.kernels.records import Survivors, neuron_width
from planner.kernels.shapes import AttentionShape, Block, MLPShape, NormShape, TokenShape
from planner.kernels.tables import Table
from planner.kernels.tiles import TARGETS

ORIGIN = Origin("small", "0123456789abcdef", "1.0")
HIDDEN = 40
RMS, LAYER = NormShape("rms"), NormShape("layer", True)
numbers = itertools.count()


def source_of(shape, tokens, *, batch=1, dtype=torch.float32, target="sm_80", index_driven=False):
    phase = "decode" if tokens == 1 else "prefill"
    block = Block(shape, phase, tokens, 64, batch, (0, 1, 3))
    (source,) = generate([block], TARGETS[target], ORIGIN, dtype=dtype, index_driven=index_driven)
    return source


def module_of(source, folder):
    path = folder / f"generated_{next(numbers)}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def intervals(lanes):
    present = [*lanes, -2]
    runs, start = [], present[0]
    for lane, after in itertools.pairwise(present):
        if after != lane + 1:
            runs.append((start, lane + 1))
            start = after
    return tuple(runs)


def norm_shape(norm):
    return None if norm is None else NormShape(norm.kind, norm.bias is not None)


# -- attention ------------------------------------------------------------------------------------


def attention_shape(weights, kept, rotary, **options):
    names = ("query", "key", "value", "output")
    return AttentionShape(
        HIDDEN,
        weights.head_dim,
        weights.group,
        weights.kv_heads,
        tuple(kept),
        rotary,
        tuple(name for name in names if getattr(weights, f"{name}_bias") is not None),
        weights.query_norm is not None,
        norm_shape(weights.norm),
        **options,
    )


def stock(weights):
    """Keyword arguments of ``run``: the weights under the names that it gives them."""
    given = {}
    for field in dataclasses.fields(weights):
        value = getattr(weights, field.name)
        if isinstance(value, torch.Tensor):
            plain = field.name.endswith(("_bias", "_norm"))
            given[field.name if plain else f"{field.name}_weight"] = value
    if weights.norm is not None:
        given |= {"norm_weight": weights.norm.weight, "norm_bias": weights.norm.bias}
        given |= {"norm_eps": weights.norm.eps, "norm_offset": weights.norm.offset}
    return {name: value for name, value in given.items() if value is not None}


def run(module, hidden, residual, given):
    """``run`` with those of the arguments that it takes, interpreted."""
    code = module.run.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    first = [hidden] + [residual] * ("residual" in names)
    with interpreting():
        return module.run(*first, **{n: v for n, v in given.items() if n in names})


def poison_groups(weights, kept):
    """NaN in every weight that belongs to groups that do not survive."""
    width = weights.group * weights.head_dim
    for unit in set(range(weights.kv_heads)) - set(kept):
        for name, heads in (("query", weights.group), ("key", 1), ("value", 1)):
            span = slice(unit * heads * weights.head_dim, (unit + 1) * heads * weights.head_dim)
            getattr(weights, name)[span] = torch.nan
            bias = getattr(weights, f"{name}_bias")
            if bias is not None:
                bias[span] = torch.nan
        weights.output[:, unit * width : (unit + 1) * width] = torch.nan


PLAIN = (5, 1, 16, 16, {})
BIASED = (4, 2, 20, 8, {"biased": True, "norm": "layer"})
NORMED = (4, 3, 24, 24, {"head_norm": True, "norm": None})


@pytest.mark.parametrize(
    ("kind", "index_driven", "shared"),
    [
        (PLAIN, False, True),
        (BIASED, False, True),
        (NORMED, False, True),
        (BIASED, True, True),
        (PLAIN, True, False),
    ],
)
def test_attention_prefills_and_decodes(kind, index_driven, shared, tmp_path):
    """A prompt of ragged samples, then one token each, against the whole sequence at once."""
    kv_heads, group, head_dim, rotary, options = kind
    batch, prompt = 2, 19
    total = prompt + 1
    weights = random_attention(HIDDEN, kv_heads, group, head_dim, **options)
    plans = [random_lanes(kv_heads, count) for count in ((2,) if shared else (1, 3))]
    survivors = Survivors.of(plans, kv_heads)
    shape = attention_shape(weights, plans[0], rotary, window=15)
    x = torch.randn(batch, total, HIDDEN)
    positions = kept_positions(total, 50, (0, 4))
    angles = random_angles(1 if shared else batch, total, rotary)
    want = naive.attention(
        x.double(),
        cast(weights, torch.float64),
        survivors,
        tuple(a.double() for a in angles),
        positions,
        x.double(),
        window=15,
    )
    poison_groups(weights, {unit for plan in plans for unit in plan})
    cache = poisoned_cache([len(plans[i % len(plans)]) for i in range(batch)], [total] * 2,
                           head_dim, torch.float32)  # fmt: skip
    done = 0
    for tokens in (prompt, 1):
        source = source_of(shape, tokens, batch=batch, index_driven=index_driven)
        now = slice(done, done + tokens)
        given = stock(weights) | {
            "cos": angles[0][:, now],
            "sin": angles[1][:, now],
            "positions": positions[:, now].contiguous(),
            "key_positions": positions,
            "units": survivors.units,
            "counts": survivors.counts,
            **{n: getattr(cache, n) for n in ("keys", "values", "first", "room", "lengths")},
        }
        got = run(module_of(source, tmp_path), x[:, now], x[:, now], given)
        assert_close(got, want[:, now], torch.float32)
        cache.lengths.add_(tokens)
        done += tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype, tmp_path):
    weights = cast(random_attention(HIDDEN, 4, 1, 16), dtype)
    kept, tokens = [0, 3], 19
    x = torch.randn(1, tokens, HIDDEN).to(dtype)
    positions = torch.arange(tokens, dtype=torch.int32)[None]
    cos, sin = (a.to(dtype) for a in random_angles(1, tokens, 16))
    want = naive.attention(
        x.double(),
        cast(weights, torch.float64),
        Survivors.of([kept], 4),
        (cos.double(), sin.double()),
        positions,
    )
    cache = poisoned_cache([2], [tokens], 16, dtype)
    shape = attention_shape(weights, kept, 16, residual=False)
    given = stock(weights) | {"cos": cos, "sin": sin, "positions": positions}
    given |= {"key_positions": positions, "keys": cache.keys, "values": cache.values}
    given |= {"first": cache.first, "room": cache.room, "lengths": cache.lengths}
    got = run(module_of(source_of(shape, tokens, dtype=dtype), tmp_path), x, None, given)
    assert_close(got, want, dtype)


# -- MLP ------------------------------------------------------------------------------------------


def mlp_shape(weights, kept):
    return MLPShape(
        HIDDEN,
        weights.up.shape[0],
        intervals(kept),
        weights.activation,
        weights.gate is not None,
        tuple(n for n in ("gate", "up", "down") if getattr(weights, f"{n}_bias") is not None),
        norm_shape(weights.norm),
    )


MLPS = {
    # neurons, groups kept of, options
    "groups of 344": (3 * 344, (0, 2), 3, {}),
    "groups that cut through units": (136, (1, 2), 4, {"gated": False, "biased": True,
                                      "activation": "gelu", "norm": "layer"}),
    "odd neurons": (37, (0, 3, 4), 5, {"biased": True, "norm": None}),
    "a table of units": (640, tuple(range(0, 80, 2)), 80, {"activation": "relu"}),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("case", MLPS)
def test_mlp(case, tokens, tmp_path):
    neurons, groups, of, options = MLPS[case]
    bounds = [round(group * neurons / of) for group in range(of + 1)]
    kept = [n for g in groups for n in range(bounds[g], bounds[g + 1])]
    weights = random_mlp(HIDDEN, neurons, **options)
    width = neuron_width(neurons)
    survivors = Survivors.of([kept], neurons, width)
    x = torch.randn(2, tokens, HIDDEN)
    want = naive.mlp(x.double(), cast(weights, torch.float64), survivors, x.double())
    read = torch.zeros(neurons, dtype=torch.bool)
    read[kept] = True
    # Neurons of units that survive in part are read and then masked.
    read = read.view(-1, width).any(dim=1).repeat_interleave(width)
    for rows in (weights.up, weights.gate, weights.up_bias, weights.gate_bias):
        if rows is not None:
            rows[~read] = torch.nan
    weights.down[:, ~read] = torch.nan
    source = source_of(mlp_shape(weights, kept), tokens, batch=2)
    assert ("TABLES" in source.text) == (case == "a table of units")
    assert_close(run(module_of(source, tmp_path), x, x, stock(weights)), want, torch.float32)


def test_samples_with_plans_of_their_own(tmp_path):
    neurons, tokens = 64, 9
    weights = random_mlp(HIDDEN, neurons)
    survivors = Survivors.of([[*range(5, 30)], [*range(64)], []], neurons, 8)
    lanes = survivors.lanes
    x = torch.randn(3, tokens, HIDDEN)
    want = naive.mlp(x.double(), cast(weights, torch.float64), survivors, x.double())
    source = source_of(mlp_shape(weights, range(neurons)), tokens, batch=3, index_driven=True)
    given = {"units": survivors.units, "counts": survivors.counts, "lanes": lanes}
    got = run(module_of(source, tmp_path), x, x, stock(weights) | given)
    assert_close(got, want, torch.float32)
    assert torch.equal(got[2], x[2])


# -- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_driven", [False, True])
def test_token_stage(index_driven, tmp_path):
    batch, tokens, groups, group, head_dim, of, keep = 2, 40, 3, 2, 16, 22, 9
    kept = [(0, 2), (1,)] if index_driven else [range(groups)]
    survivors = Survivors.of(kept, groups)
    cache = poisoned_cache([groups] * 2, [tokens] * 2, head_dim, torch.float32)
    for sample in range(batch):
        for slot in range(len(kept[sample % len(kept)])):
            cache.keys[cache.rows(sample, slot, tokens)] = torch.randn(tokens, head_dim)
    positions = kept_positions(tokens, 60, (0, 6))
    candidates = torch.zeros(batch, tokens, dtype=torch.bool)
    candidates[:, 8 : 8 + of] = True
    keeps = torch.full((batch,), keep, dtype=torch.int32)
    queries = torch.randn(batch, groups * group, head_dim)
    hidden = torch.randn(batch, tokens, HIDDEN)
    length = tokens - of + keep
    scores = naive.score_tokens(queries, cache, survivors, positions, scale=head_dim**-0.5)
    want = naive.choose_tokens(scores, candidates, positions, keeps, length, survivors.counts)
    shape = TokenShape(HIDDEN, head_dim, group, groups, groups, keep, of)
    source = source_of(shape, tokens, batch=batch, index_driven=index_driven)
    given = {"queries": queries, "candidates": candidates, "keep": keeps, "length": length}
    given |= {"positions": positions, "keys": cache.keys, "first": cache.first, "room": cache.room}
    given |= {"counts": survivors.counts}
    chosen, index = run(module_of(source, tmp_path), hidden, None, given)
    assert torch.equal(index, want)
    assert torch.equal(chosen, naive.gather_tokens(hidden, want))


# -- text -----------------------------------------------------------------------------------------

SHAPES = {
    "attention_decode": (AttentionShape(64, 16, 2, 8, (0, 1, 5, 6, 7), 16, norm=RMS), 1, False),
    "attention_prefill": (
        AttentionShape(64, 16, 1, 8, (0, 1, 2), 16, ("query",), True, RMS), 100, False,
    ),
    "mlp_prefill": (MLPShape(64, 192, ((0, 64), (96, 160)), "silu", norm=RMS), 100, False),
    "mlp_plain": (MLPShape(64, 96, ((0, 96),), "gelu", False, ("up", "down"), LAYER), 1, False),
    "mlp_index_driven": (MLPShape(64, 192, ((0, 64),), "silu", norm=RMS), 1, True),
    "tokens": (TokenShape(64, 16, 2, 4, 3, 9, 22), 100, False),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_golden_source(name, golden):
    shape, tokens, index_driven = SHAPES[name]
    source = source_of(
        shape, tokens, dtype=torch.bfloat16, target="sm_90", index_driven=index_driven
    )
    golden(f"{name}.py.txt", source.text)


@pytest.mark.parametrize("name", SHAPES)
def test_a_source_stands_alone_and_fits_a_page(name):
    shape, tokens, index_driven = SHAPES[name]
    text = source_of(shape, tokens, index_driven=index_driven).text
    imports = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {alias.name for node in imports for alias in node.names} <= {
        "torch", "triton", "triton.language", "functools",
    }  # fmt: skip
    assert max(map(len, text.splitlines())) <= 100
    assert "is not None" not in text


def test_blocks_that_differ_in_survivors_alone_share_an_index_driven_source():
    blocks = [
        Block(AttentionShape(64, 16, 1, 8, kept, 16), "prefill", 64, 64, 1, layers)
        for kept, layers in (((0, 1), (0, 2)), ((3,), (1,)))
    ]
    static = generate(blocks, TARGETS["sm_90"], ORIGIN)
    assert [source.name for source in static] == [
        "attention_2_prefill_64",
        "attention_1_prefill_64",
    ]
    (driven,) = generate(blocks, TARGETS["sm_90"], ORIGIN, index_driven=True)
    assert driven.block.layers == (0, 1, 2)


class _Arrays:
    """`tl`, as far as a table's function uses it, on integers."""

    @staticmethod
    def where(test, yes, no):
        return yes if test else no


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_tables_compute_their_entries(entries):
    table = Table.of("entry", "", entries)
    code = table.source.partition("\n")[2]
    scope = {"tl": _Arrays}
    exec(code, scope)
    assert [scope["entry"](slot) for slot in range(len(entries))] == entries
    assert table.constant is None or {*entries} == {table.constant}
    assert not table.is_identity or entries == [*range(len(entries))]
