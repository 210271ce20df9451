"""The kernels that read and write stock layouts, interpreted, against dense products in float64."""

import pytest
import torch
from blocks import DTYPES, assert_close, random_lanes
from torch.nn import functional as F

from planner.kernels.qkv import project_in_place
from planner.kernels.records import Survivors
from planner.kernels.stock import attend_stock
from planner.kernels.tiles import AttentionTile, Tile

GROUPS = 5
SMALL = AttentionTile(block_m=16, block_n=16, warps=4, stages=1)


def _alive(kept, width):
    """True for the features of surviving groups, one row per plan."""
    alive = torch.zeros(len(kept), GROUPS, dtype=torch.bool)
    for row, lanes in zip(alive, kept, strict=True):
        row[lanes] = True
    return alive.repeat_interleave(width, dim=1)


def _plans(count):
    return [random_lanes(GROUPS, 3), [], random_lanes(GROUPS, 1)][:count]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plans", [1, 3])
@pytest.mark.parametrize(
    "widths",
    [(24, 12, 12), (16, 16, 16), (10,)],
    ids=["shared keys", "plain", "one weight"],
)
def test_projections_in_place(dtype, plans, widths):
    """Tiles of 16 columns: within a head, across heads, and across the last survivor."""
    kept = _plans(plans)
    x = torch.randn(3, 7, 37).to(dtype)
    weights = [(torch.randn(GROUPS * width, 37) / 6).to(dtype) for width in widths]
    biases = [torch.randn(GROUPS * widths[0]).to(dtype), None, None][: len(widths)]
    want = [
        F.linear(x.double(), w.double(), None if b is None else b.double())
        * _alive(kept, width)[:, None]
        for w, b, width in zip(weights, biases, widths)
    ]
    for w, b, width in zip(weights, biases, widths):
        nowhere = ~_alive(kept, width).any(dim=0)
        w[nowhere] = torch.nan
        if b is not None:
            b[nowhere] = torch.nan
    survivors = Survivors.of(kept, GROUPS)
    # Behind a plan's survivors there may be anything.
    behind = torch.arange(GROUPS) >= survivors.counts[:, None]
    survivors.units[behind] = 10**6
    outputs = [x.new_empty(3, 7, w.shape[0]) for w in weights]
    project_in_place(x, weights, biases, survivors, outputs, Tile(16, 16, 32, 4, 2, 2))
    for got, expected, width in zip(outputs, want, widths, strict=True):
        assert_close(got, expected, dtype)
        dead = ~_alive(kept, width)[:, None].expand(3, 7, -1)
        assert (got[dead] == 0).all()


def _mask(form, batch, heads, tokens, keys, dtype):
    """As stock code makes them, and as it might; (mask, whether causality is left to attention)."""
    seen = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    padded = seen.expand(batch, 1, -1, -1).clone()
    padded[0, :, :, :5] = False
    if tokens > 1:
        padded[0, :, :2] = False  # queries that see nothing
    if form == "causal":
        return None, True
    if form == "padded":
        return padded, False
    if form == "one for all":
        return seen[None, None], False
    if form == "room behind":
        # The rows of a static cache's mask: longer than what is read of them.
        return F.pad(padded, (0, 11))[..., :keys], False
    if form == "added":
        # Holes in the middle, and finite numbers that hide as well as infinite ones.
        added = torch.randn(batch, 1, tokens, keys)
        added[torch.rand(added.shape) < 0.3] = -torch.inf
        added[..., 0] = 0
        added[:, :, 1:2, 1:] = torch.finfo(dtype).min
        return added.to(dtype), False
    if form == "by head":
        by_head = torch.rand(1, heads, tokens, keys) < 0.4
        by_head[..., keys // 2] = True
        return by_head, False
    return None, False


def _compare(form, tokens, keys, *, plans=1, group=1, unit=1, head_dim=16, dtype=torch.float32,
             **options):  # fmt: skip
    """`unit` KV heads to a plan's unit, `group` queries to a KV head."""
    batch, kept = 3, _plans(plans)
    kv_heads, heads = GROUPS * unit, GROUPS * unit * group
    # Queries and values lie token by token, as projections leave them.
    query = torch.randn(batch, tokens, heads, head_dim).to(dtype).transpose(1, 2)
    key = torch.randn(batch, kv_heads, keys, head_dim).to(dtype)
    value = torch.randn(batch, keys, kv_heads, head_dim).to(dtype).transpose(1, 2)
    mask, causal = _mask(form, batch, heads, tokens, keys, dtype)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    repeated = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    want = F.scaled_dot_product_attention(
        query.double(), *repeated, wide, is_causal=causal, scale=0.3
    )
    want = want.nan_to_num(0.0).transpose(1, 2)
    alive = [_alive(kept, width).expand(batch, -1) for width in (unit * group, unit, unit)]
    for operand, kept_heads in zip((query, key, value), alive):
        operand[~kept_heads] = torch.nan
    survivors = Survivors.of(kept, GROUPS)
    got = attend_stock(
        query, key, value, mask, survivors, scale=0.3, causal=causal, tile=SMALL, **options
    )
    for sample in range(batch):
        expected = want[sample, :, alive[0][sample]]
        count = expected.shape[1]
        if count:
            assert_close(got[sample, :, :count], expected, dtype)
        assert got[sample, :, count:].isnan().all()


FORMS = ("none", "causal", "padded", "one for all", "room behind", "added", "by head")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plans", [1, 3])
def test_prompts(form, plans):
    _compare(form, 21, 37 if form != "causal" else 21, plans=plans, group=2, head_dim=20)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("splits", [1, 3])
def test_single_tokens(form, splits):
    _compare(form, 1, 53, plans=3, group=2, splits=splits)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("form", ["padded", "added"])
def test_half_precision(dtype, form):
    _compare(form, 17, 40, dtype=dtype)
    _compare("room behind" if form == "padded" else form, 1, 40, dtype=dtype, splits=2)


def test_units_of_several_kv_heads():
    _compare("padded", 9, 20, plans=3, group=2, unit=2)
    _compare("none", 1, 20, plans=3, group=2, unit=3, splits=2)


def test_more_keys_than_queries_and_the_other_way_round():
    """Causality is counted from the first key, as F.scaled_dot_product_attention counts."""
    _compare("causal", 21, 37)
    _compare("causal", 21, 8)
    _compare("causal", 1, 37, splits=2)
