"""Selectors before the projector, each against a few lines of numpy, picture by picture."""

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.ir.errors import InputError
from planner.models.tokens.selectors import TowerAttention, VisionInputs, select_features
from planner.models.tokens.selectors.hired import tile_counts
from planner.planning.selectors import (
    TRIM,
    CDPruner,
    Downsample,
    FasterVLM,
    HiRED,
    PruMerge,
    PruMergePlus,
    VisionZip,
    VisPruner,
)

few = settings(max_examples=15, deadline=None)
HEADS, WIDTH = 2, 8


def random_inputs(rng, runs, patches, sharpness=2.0, cls=True, **more):
    def tower():
        queries = (runs, WIDTH) if cls else (runs, patches, WIDTH)
        return TowerAttention(
            torch.from_numpy(rng.normal(size=queries) * sharpness),
            torch.from_numpy(rng.normal(size=(runs, cls + patches, WIDTH))),
            HEADS,
        )

    return VisionInputs(
        features=torch.from_numpy(rng.normal(size=(runs, patches, 5))),
        cls_feature=torch.from_numpy(rng.normal(size=(runs, 5))) if cls else None,
        tower={0: tower(), -1: tower(), -2: tower()},
        patch_embeddings=torch.from_numpy(rng.normal(size=(runs, patches, 3))),
        text_embeddings=torch.from_numpy(rng.normal(size=(runs, 3)) * sharpness),
        **more,
    )


def softmax(logits):
    exponent = np.exp(logits - logits.max())
    return exponent / exponent.sum()


def cls_row(inputs, layer, run, heads):
    """Summed over heads; without a CLS token of all patches, averaged over them."""
    queries, key = inputs.tower[layer].query[run].numpy(), inputs.tower[layer].key[run].numpy()
    d = WIDTH // heads
    if queries.ndim == 2:
        parts = [slice(h * d, (h + 1) * d) for h in range(heads)]
        every = [[softmax(key[:, p] @ q[p] / sqrt(d)) for q in queries] for p in parts]
        return np.sum(np.mean(every, axis=1), axis=0)
    rows = [
        softmax(key[:, h * d : (h + 1) * d] @ queries[h * d : (h + 1) * d] / sqrt(d))[1:]
        for h in range(heads)
    ]
    return np.sum(rows, axis=0)


def falling(scores):
    return np.argsort(-scores, kind="stable").tolist()


def fence(scores):
    q1, q3 = np.percentile(scores, [25, 75])
    return q3 + 1.5 * (q3 - q1)


def naive_merge(x, keys, attention, kept, neighbours):
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    out = []
    for i in kept:
        others = [j for j in range(len(x)) if j != i]
        near = sorted(others, key=lambda j: (-(unit[i] @ unit[j]), j))[:neighbours]
        out.append(x[i] + sum((attention[j] * x[j] for j in near), np.zeros(x.shape[1])))
    rest = [j for j in range(len(x)) if j not in kept]
    if rest:
        out.append(sum(attention[j] * x[j] for j in rest))
    return np.array(out)


def naive_cap(kept, scores, cap):
    """At most a share of tokens, one of them for the others: those with the highest scores."""
    if cap is None:
        return kept
    room = max(1, int(len(scores) * cap)) - 1
    best = sorted(kept, key=lambda i: (-scores[i], kept.index(i)))[:room]
    return [i for i in kept if i in best]


def check_merged(inputs, selection, run, attention, kept, neighbours):
    keys = inputs.tower[-1].key[run, 1:].numpy()
    expected = naive_merge(inputs.features[run].numpy(), keys, attention, kept, neighbours)
    summary = [-1] * (len(expected) - len(kept))
    assert selection.indices[run].tolist() == kept + summary
    np.testing.assert_allclose(selection.features[run].numpy(), expected, atol=1e-12)


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    patches=st.integers(1, 49),
    sharpness=st.sampled_from([0.0, 1.0, 3.0]),
    neighbours=st.sampled_from([0, 3, 32]),
    cap=st.sampled_from([None, 0.01, 0.1, 0.5]),
)
@example(seed=0, patches=49, sharpness=3.0, neighbours=32, cap=None)
@example(seed=0, patches=49, sharpness=3.0, neighbours=32, cap=0.1)
def test_prumerge(seed, patches, sharpness, neighbours, cap):
    inputs = random_inputs(np.random.default_rng(seed), 3, patches, sharpness)
    selection = select_features(PruMerge(neighbours, cap), inputs)
    for run in range(3):
        attention = cls_row(inputs, -1, run, heads=1)
        if sharpness == 0:  # all equal, up to rounding in the reference
            attention = np.full(patches, attention.mean())
        kept = [i for i in falling(attention) if attention[i] > fence(attention)]
        kept = naive_cap(kept, attention, cap)
        check_merged(inputs, selection, run, attention, kept, neighbours)


def test_prumerge_without_outliers_is_one_token():
    inputs = random_inputs(np.random.default_rng(0), 1, 16, sharpness=0.0)
    selection = select_features(PruMerge(), inputs)
    torch.testing.assert_close(selection.features[0], inputs.features[0].sum(0, keepdim=True) / 17)


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    patches=st.integers(1, 64),
    sharpness=st.sampled_from([0.0, 1.0, 3.0]),
    cap=st.sampled_from([None, 0.01, 0.1, 0.5]),
)
@example(seed=0, patches=64, sharpness=3.0, cap=None)
@example(seed=0, patches=64, sharpness=3.0, cap=0.1)
@example(seed=0, patches=64, sharpness=0.0, cap=0.1)
def test_prumerge_plus_adaptive(seed, patches, sharpness, cap):
    inputs = random_inputs(np.random.default_rng(seed), 3, patches, sharpness)
    selection = select_features(PruMergePlus(neighbours=3, max=cap), inputs)
    for run in range(3):
        attention = cls_row(inputs, -1, run, heads=1)
        if sharpness == 0:
            attention = np.full(patches, attention.mean())
        kept = [i for i in falling(attention) if attention[i] > fence(attention)]
        step = patches // max(len(kept), 1)
        offset, stride = 0, max(int(step / 3), 1)
        while offset < patches - 1:
            if offset not in kept:
                kept.append(offset)
            offset += stride
        if cap is None or sharpness:  # else rounding ranks what is equal
            check_merged(inputs, selection, run, attention, naive_cap(kept, attention, cap), 3)
        if cap is not None:
            assert len(selection.features[run]) <= max(1, int(patches * cap))


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    patches=st.integers(1, 64),
    ratio=st.sampled_from([1 / 64, 0.1, 1 / 8, 0.3, 0.5, 1.0]),
)
@example(seed=0, patches=64, ratio=1 / 8)
def test_prumerge_plus_fixed(seed, patches, ratio):
    inputs = random_inputs(np.random.default_rng(seed), 3, patches)
    selector = PruMergePlus(neighbours=3, ratio=ratio)
    selection = select_features(selector, inputs)
    step = int(1 / ratio)
    grid = [i for i in range(patches - 1) if i % step == step // 2 % step and i >= step // 2]
    for run in range(3):
        attention = cls_row(inputs, -1, run, heads=1)
        outside = [i for i in falling(attention) if i not in grid]
        kept = outside[: int(patches * ratio)] + grid
        check_merged(inputs, selection, run, attention, kept, 3)
        assert len(selection.features[run]) == selector.counts(patches)[0]


def test_prumerge_loses_no_outlier_to_rounding():
    """The reference keeps int(n (k / n)) of k outliers, which may be one fewer."""
    assert int(49 * (4 / 49)) == 3
    key = torch.zeros(1, 50, WIDTH, dtype=torch.float64)
    key[0, 1:5, 0] = torch.linspace(4, 5, 4, dtype=torch.float64)
    query = torch.zeros(1, WIDTH, dtype=torch.float64)
    query[0, 0] = WIDTH**0.5
    inputs = random_inputs(np.random.default_rng(0), 1, 49)
    inputs = replace(inputs, tower={-1: TowerAttention(query, key, HEADS)})
    (index,) = select_features(PruMerge(), inputs).indices
    assert index.tolist() == [3, 2, 1, 0, -1]


def test_prumerge_plus_gives_the_145_tokens_of_the_reference():
    assert PruMergePlus(ratio=1 / 8).counts(576) == (145,)
    inputs = random_inputs(np.random.default_rng(1), 2, 576)
    selection = select_features(PruMergePlus(ratio=1 / 8), inputs)
    for run in range(2):
        kept = selection.indices[run][:-1].tolist()
        assert len(set(kept)) == 144
        top = falling(cls_row(inputs, -1, run, heads=1))[:72]
        assert set(top) <= set(kept), "a patch of the 72 best is missing"
        assert set(range(4, 575, 8)) <= set(kept), "a patch of the grid is missing"


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    patches=st.integers(1, 40),
    dominant=st.integers(1, 45),
    contextual=st.integers(0, 12),
    cls=st.booleans(),
)
@example(seed=0, patches=40, dominant=9, contextual=5, cls=True)
@example(seed=0, patches=40, dominant=9, contextual=5, cls=False)
def test_visionzip(seed, patches, dominant, contextual, cls):
    inputs = random_inputs(np.random.default_rng(seed), 2, patches, cls=cls)
    selector = VisionZip(dominant, contextual)
    selection = select_features(selector, inputs)
    for run in range(2):
        x = inputs.features[run].numpy()
        keys = inputs.tower[-2].key[run, int(cls) :].numpy().reshape(patches, HEADS, -1).mean(1)
        keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        kept = sorted(falling(cls_row(inputs, -2, run, HEADS))[: dominant - cls])
        rest = [i for i in range(patches) if i not in kept]
        count = min(contextual, len(rest))
        targets = rest[:: max(1, len(rest) // max(count, 1))][:count]
        joined = {target: [] for target in targets}
        for i in rest:
            if i not in targets and targets:
                joined[max(targets, key=lambda t: keys[i] @ keys[t])].append(x[i])
        expected = [*([inputs.cls_feature[run].numpy()] if cls else []), *x[kept]]
        expected += [x[t] + (np.mean(joined[t], axis=0) if joined[t] else 0) for t in targets]
        np.testing.assert_allclose(selection.features[run].numpy(), np.array(expected), atol=1e-12)
        assert selection.indices[run].tolist() == [-1] * cls + [*kept, *[-1] * count]
        promised = selector.counts(patches)[0]
        assert len(expected) == (promised if cls else min(promised, patches))


def test_visionzip_counts_of_the_paper():
    assert VisionZip().counts(576) == (64,)
    assert VisionZip(dominant=108, contextual=20).counts(576) == (128,)
    assert VisionZip(dominant=162, contextual=30).counts(576) == (192,)


def naive_hired(inputs, run, ratio, alpha, rows, columns, side):
    """Patches kept in each run of one image that begins at `run`."""
    n, tiles = side * side, rows * columns
    late = [cls_row(inputs, -2, run + i, HEADS) for i in range(1 + tiles)]
    if ratio == 1:
        return [list(range(n))] * len(late)
    total = int((1 + tiles) * n * ratio)
    overview = min(int(total * alpha), n) if tiles else min(total, n)
    kept = [sorted(falling(late[0])[:overview])]
    marked = falling(cls_row(inputs, 0, run, HEADS))[: int(n * (1 - alpha))]
    for tile in range(tiles):
        inside = 0
        for patch in marked:
            y, x = (patch // side + 0.5) / side, (patch % side + 0.5) / side
            inside += int(y * rows) == tile // columns and int(x * columns) == tile % columns
        spend = min(total - overview, tiles * n)
        budget = min(n, inside * spend // max(len(marked), 1))
        kept.append(sorted(falling(late[1 + tile])[:budget]))
    return kept


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    side=st.integers(1, 7),
    ratio=st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0]),
    alpha=st.sampled_from([0.0, 0.5, 0.6, 1.0]),
    tiles=st.lists(
        st.sampled_from([(0, 0), (1, 1), (2, 2), (1, 3), (4, 1)]), min_size=1, max_size=3
    ),
)
@example(seed=0, side=6, ratio=0.3, alpha=0.5, tiles=[(2, 2), (0, 0), (1, 3)])
def test_hired(seed, side, ratio, alpha, tiles):
    runs = sum(1 + rows * columns for rows, columns in tiles)
    inputs = random_inputs(np.random.default_rng(seed), runs, side * side, tiles=tuple(tiles))
    selection = select_features(HiRED(ratio, alpha), inputs)
    first = 0
    for rows, columns in tiles:
        for offset, kept in enumerate(
            naive_hired(inputs, first, ratio, alpha, rows, columns, side)
        ):
            run = first + offset
            assert selection.indices[run].tolist() == kept
            assert torch.equal(selection.features[run], inputs.features[run, kept])
        first += 1 + rows * columns


def test_hired_keeps_the_tables_number_and_never_overspends():
    assert HiRED(ratio=0.2).counts(576) == (115,)
    inputs = random_inputs(np.random.default_rng(3), 5, 576, tiles=((2, 2),))
    left = [len(index) for index in select_features(HiRED(ratio=0.2), inputs).indices]
    assert left[0] == 288
    assert 576 - 4 <= sum(left) <= 576


def test_hired_keeps_everything_at_a_ratio_of_1():
    inputs = random_inputs(np.random.default_rng(3), 1 + 6, 16, tiles=((2, 3),))
    selection = select_features(HiRED(ratio=1), inputs)
    assert [len(indices) for indices in selection.indices] == [16] * 7


def test_hired_counts_patches_where_they_lie():
    marked = torch.zeros(24, 24, dtype=torch.bool)
    marked[2:5, 14:20] = True
    assert tile_counts(marked.flatten(), 2, 2).tolist() == [0, 18, 0, 0]


def test_hired_refuses_tiles_that_do_not_add_up():
    inputs = random_inputs(np.random.default_rng(3), 4, 9, tiles=((2, 2),))
    with pytest.raises(InputError, match="got 4 runs"):
        select_features(HiRED(), inputs)


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    patches=st.integers(1, 40),
    ratio=st.sampled_from([None, 0.0, 0.21, 1.0]),
    cap=st.sampled_from([None, 0.01, 0.1, 0.5]),
)
@example(seed=0, patches=40, ratio=None, cap=None)
@example(seed=0, patches=40, ratio=None, cap=0.1)
def test_trim(seed, patches, ratio, cap):
    inputs = random_inputs(np.random.default_rng(seed), 3, patches)
    cap = cap if ratio is None else None
    selector = TRIM(ratio, cap)
    selection = select_features(selector, inputs)
    for run in range(3):
        dots = inputs.patch_embeddings[run].numpy() @ inputs.text_embeddings[run].numpy()
        scores = softmax(-dots)
        if ratio is None:
            kept = np.flatnonzero(scores > fence(scores)).tolist()
            kept = naive_cap(kept, scores, cap)
        else:
            kept = sorted(falling(scores)[: int(patches * ratio)])
            assert len(selection.features[run]) == selector.counts(patches)[0]
        x = inputs.features[run].numpy()
        others = [i for i in range(patches) if i not in kept]
        expected = [*x[kept], *([x[others].mean(0)] if others else [])]
        assert selection.indices[run].tolist() == kept + [-1] * bool(others)
        np.testing.assert_allclose(selection.features[run].numpy(), np.array(expected), atol=1e-12)


def naive_vispruner(x, attention, keep, important):
    order, chosen = falling(attention), int(keep * important)
    picked, left = order[:chosen], order[chosen:]
    while keep > chosen and len(left) > keep - chosen:
        even, odd = left[::2], left[1::2]
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        alike = np.array([max(unit[e] @ unit[o] for o in odd) for e in even])
        left = [even[i] for i in falling(alike)[min(8, len(left) - (keep - chosen)) :]] + odd
    return sorted(picked + left[: keep - chosen])


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    patches=st.integers(1, 60),
    keep=st.integers(0, 40),
    important=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    cls=st.booleans(),
)
@example(seed=0, patches=60, keep=9, important=0.5, cls=True)
@example(seed=0, patches=57, keep=3, important=0.5, cls=False)
def test_vispruner(seed, patches, keep, important, cls):
    inputs = random_inputs(np.random.default_rng(seed), 2, patches, cls=cls)
    for selector in (VisPruner(keep, important), FasterVLM(keep)):
        selection = select_features(selector, inputs)
        for run in range(2):
            attention, x = cls_row(inputs, -2, run, HEADS), inputs.features[run].numpy()
            share = important if isinstance(selector, VisPruner) else 1
            kept = naive_vispruner(x, attention, keep, share)
            assert selection.indices[run].tolist() == kept
            assert torch.equal(selection.features[run], inputs.features[run, kept])
            assert len(kept) == selector.counts(patches)[0]


@pytest.mark.parametrize(("before", "side"), [(6, 3), (7, 3), (5, 5), (24, 12)])
def test_downsample(before, side):
    inputs = random_inputs(np.random.default_rng(before), 2, before**2)
    selection = select_features(Downsample(side), inputs)
    for run in range(2):
        x = inputs.features[run].numpy().reshape(before, before, -1)
        cells = [(i * before // side, -(-(i + 1) * before // side)) for i in range(side)]
        expected = [x[a:b, c:d].mean((0, 1)) for a, b in cells for c, d in cells]
        np.testing.assert_allclose(selection.features[run].numpy(), expected, atol=1e-12)
        rows, columns = np.divmod(selection.indices[run].numpy(), before)
        assert all(a <= row < b for row, (a, b) in zip(rows[::side], cells, strict=True))
        assert all(a <= column < b for column, (a, b) in zip(columns[:side], cells, strict=True))


@pytest.mark.parametrize(("side", "patches"), [(3, 10), (4, 9)])
def test_a_picture_without_such_a_grid_is_refused(side, patches):
    with pytest.raises(InputError, match=f"at least {side} a side, and a picture has {patches} pa"):
        Downsample(side).counts(patches)


def naive_cdpruner(inputs, run, keep):
    """Every turn the patch that makes the determinant of what is picked largest."""
    x, patches = inputs.projected[run].numpy(), inputs.patch_embeddings[run].numpy()
    text = inputs.text_embeddings[run].numpy()
    similar = -(patches / np.linalg.norm(patches, axis=1, keepdims=True)) @ text
    weight = (similar - similar.min() + 1e-6) / np.ptp(similar) if len(x) > 1 else np.ones(1)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    kernel = weight[:, None] * (unit @ unit.T) * weight
    picked = []
    for _ in range(min(keep, len(x))):
        others = [i for i in range(len(x)) if i not in picked]
        picked.append(
            max(others, key=lambda i: np.linalg.det(kernel[np.ix_([*picked, i], [*picked, i])]))
        )
    return sorted(picked)


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    patches=st.integers(1, 30),
    keep=st.integers(0, 6),
)
@example(seed=0, patches=30, keep=6)
def test_cdpruner(seed, patches, keep):
    rng = np.random.default_rng(seed)
    projected = torch.from_numpy(rng.normal(size=(2, patches, 9)))
    inputs = random_inputs(rng, 2, patches, projected=projected)
    selection = select_features(CDPruner(keep), inputs)
    for run in range(2):
        kept = naive_cdpruner(inputs, run, keep)
        assert selection.indices[run].tolist() == kept
        assert torch.equal(selection.features[run], projected[run, kept])
        assert len(kept) == CDPruner(keep).counts(patches)[0]


def test_cdpruner_takes_equal_patches_in_order_and_keeps_all_it_may():
    same = torch.ones(1, 5, 4)
    inputs = VisionInputs(
        same, patch_embeddings=same, text_embeddings=torch.ones(1, 4), projected=same
    )
    kept = select_features(CDPruner(3), inputs).indices[0].tolist()
    assert kept[0] == 0
    assert len(set(kept)) == 3
    assert select_features(CDPruner(9), inputs).indices[0].tolist() == [0, 1, 2, 3, 4]
