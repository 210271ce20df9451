"""Selectors inside the decoder, each against a few lines of numpy, sample by sample."""

from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.models.tokens.selectors import DecoderInputs, mark_tokens, select_tokens
from planner.models.tokens.selectors.sparsevlm import cluster
from planner.models.tokens.selectors.uniform import evenly_spaced, grid_points
from planner.planning.selectors import (
    DART,
    DivPrune,
    FastV,
    Random,
    Sizes,
    SparseVLM,
    Uniform,
)

few = settings(max_examples=20, deadline=None)
HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 4, 6
POSITIONS = st.sampled_from(["contiguous", "original"])


def kept_places(selection, image):
    """Per sample, the places of kept image tokens."""
    return [row.nonzero().flatten() for row in selection.keep & image]


def random_inputs(rng, batch=3, side=None, images=None):
    """Padded prompts of different lengths, image tokens anywhere, random everything."""
    side = side or rng.choice(["left", "right"])
    lengths = rng.integers(1, 24, batch)
    seq = int(lengths.max()) + int(rng.integers(0, 3))
    valid = np.zeros((batch, seq), dtype=bool)
    for sample, length in enumerate(lengths):
        valid[sample, slice(seq - length, None) if side == "left" else slice(0, length)] = True
    image = valid & (rng.random((batch, seq)) < rng.random((batch, 1)))
    return DecoderInputs(
        image=torch.from_numpy(image if images is None else images),
        valid=torch.from_numpy(valid),
        query=torch.from_numpy(rng.normal(size=(batch, HEADS, seq, HEAD_DIM))),
        key=torch.from_numpy(rng.normal(size=(batch, KV_HEADS, seq, HEAD_DIM))),
        hidden_states=torch.from_numpy(rng.normal(size=(batch, seq, WIDTH))),
        normed_states=torch.from_numpy(rng.normal(size=(batch, seq, WIDTH))),
    )


def attention_of(inputs, sample):
    """Causal attention over the sample's own tokens: (heads, n, n), and where the tokens are."""
    where = inputs.valid[sample].nonzero().flatten().numpy()
    query, key = inputs.query[sample].numpy()[:, where], inputs.key[sample].numpy()[:, where]
    weights = np.zeros((HEADS, len(where), len(where)))
    for head in range(HEADS):
        for row in range(len(where)):
            logits = key[head // (HEADS // KV_HEADS), : row + 1] @ query[head, row] / sqrt(HEAD_DIM)
            weights[head, row, : row + 1] = np.exp(logits) / np.exp(logits).sum()
    return weights, where


def best(scores, count):
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


@few
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 0.77, 1.0]))
def test_fastv(seed, r):
    inputs = random_inputs(np.random.default_rng(seed))
    selection = select_tokens(FastV(k=2, r=r), inputs, 2)
    for sample in range(3):
        weights, where = attention_of(inputs, sample)
        tokens = np.flatnonzero(inputs.image[sample].numpy()[where])
        scores = weights.mean(0)[-1][tokens]
        kept = where[tokens[best(scores, round(len(tokens) * (1 - r)))]].tolist()
        assert kept_places(selection, inputs.image)[sample].tolist() == kept
    assert bool((selection.keep | inputs.image).all()), "text was dropped"


def test_fastv_keeps_the_papers_number_and_reads_a_mask():
    assert FastV(k=2, r=0.5).counts(576) == (288,)
    assert FastV(k=3, r=0.75).counts(576) == (144,)
    # Token 0 is what the last query likes best, but a window hides it.
    query, key = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    query[0, 0, 3], key[0, 0, :3, 0] = torch.tensor([1.0, 0.0]), torch.tensor([9.0, 1.0, 5.0])
    image = torch.tensor([[True, True, True, False]])
    window = torch.ones(4, 4).tril().triu(-2).bool()[None, None]
    everything = torch.ones(1, 4).bool()
    inputs = DecoderInputs(image, everything, query, key)
    assert kept_places(select_tokens(FastV(r=2 / 3), inputs, 2), image)[0].tolist() == [0]
    inputs = DecoderInputs(image, everything, query, key, attention_mask=window)
    assert kept_places(select_tokens(FastV(r=2 / 3), inputs, 2), image)[0].tolist() == [2]


def test_fastv_sees_only_the_new_turn_of_a_cached_chat():
    rng = np.random.default_rng(5)
    whole = random_inputs(rng, batch=1)
    seq = whole.image.shape[1]
    past = seq // 2
    image = whole.image.clone()
    image[:, :past] = False
    query = whole.query
    cached = DecoderInputs(image[:, past:], whole.valid, query[:, :, past:], whole.key)
    at_once = DecoderInputs(image, whole.valid, query, whole.key)
    kept = select_tokens(FastV(), cached, 2).keep
    assert torch.equal(kept, select_tokens(FastV(), at_once, 2).keep[:, past:])


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@few
@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(1, 5), st.integers(0, 4))
@example(seed=3, keep=8, image_pivots=2, text_pivots=2)
def test_dart(seed, keep, image_pivots, text_pivots):
    inputs = random_inputs(np.random.default_rng(seed))
    selector = DART(keep, image_pivots=image_pivots, text_pivots=text_pivots)
    selection = select_tokens(selector, inputs, 2)
    for sample, kept in enumerate(kept_places(selection, inputs.image)):
        states = inputs.normed_states[sample].numpy()
        norms = np.abs(inputs.key[sample].numpy()).sum((0, 2))
        tokens = inputs.image[sample].nonzero().flatten().tolist()
        valid = inputs.valid[sample].nonzero().flatten().tolist()
        behind = [t for t in valid if t > max(tokens, default=99)]
        expected = sorted(tokens, key=lambda t: -norms[t])[:image_pivots]
        pivots = expected + sorted(behind, key=lambda t: -norms[t])[:text_pivots]
        pivots.sort(key=lambda t: -norms[t])
        share = keep // (image_pivots + text_pivots)
        for pivot in pivots + pivots[-1:] * (image_pivots + text_pivots - len(pivots)):
            left = [t for t in tokens if t not in expected]
            expected += sorted(left, key=lambda t: cosine(states[t], states[pivot]))[:share]
        assert kept.tolist() == sorted(expected)
        assert len(kept) == selector.counts(len(tokens))[0]


def test_dart_keeps_the_132_tokens_of_the_reference():
    assert DART(keep=128).counts(576) == (132,)
    assert DART(keep=128).products(2, Sizes(576, hidden=4096)) == ((8, 576, 4096),)


@few
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans())
def test_divprune(seed, ratio, twins):
    rng = np.random.default_rng(seed)
    inputs = random_inputs(rng)
    if twins:
        inputs.hidden_states[:] = inputs.hidden_states[:, rng.integers(0, 2, inputs.image.shape[1])]
    selection = select_tokens(DivPrune(ratio=ratio), inputs, 0)
    for sample, kept in enumerate(kept_places(selection, inputs.image)):
        tokens = inputs.image[sample].nonzero().flatten().tolist()
        states = inputs.hidden_states[sample].numpy()
        apart = {(a, b): 1 - cosine(states[a], states[b]) for a in tokens for b in tokens}
        picked = []
        for _ in range(round(len(tokens) * ratio)):
            left = [t for t in tokens if t not in picked]
            others = {t: [o for o in picked or tokens if o != t] for t in left}
            picked.append(max(left, key=lambda t: min((apart[t, o] for o in others[t]), default=0)))
        if not twins:  # of duplicates rounding decides
            assert kept.tolist() == sorted(picked)
        assert len(kept) == len(picked)


def test_divprune_keeps_the_56_tokens_of_the_reference():
    assert DivPrune().counts(576) == (56,)


@few
@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(0, 5))
def test_random_depends_on_seed_and_ordinal_alone(seed, keep, stream):
    inputs = random_inputs(np.random.default_rng(seed))
    selection = select_tokens(Random(keep=keep, seed=stream), inputs, 0)
    draws = np.random.default_rng(stream).random(inputs.image.shape[1])
    for sample, kept in enumerate(kept_places(selection, inputs.image)):
        tokens = inputs.image[sample].nonzero().flatten().numpy()
        assert kept.tolist() == tokens[best(draws[: len(tokens)], keep)].tolist()


def test_random_differs_by_seed_and_covers_all_tokens():
    image = torch.ones(1, 64, dtype=torch.bool)
    inputs = DecoderInputs(image, image)
    times = sum(
        select_tokens(Random(keep=16, seed=seed), inputs, 0).keep.int() for seed in range(200)
    )
    # 200 draws with probability 1/4: mean 50, standard deviation 6.1.
    assert times.min() > 20
    assert times.max() < 80


@few
@given(st.integers(0, 300), st.data())
def test_evenly_spaced_and_grid_points(n, data):
    keep = data.draw(st.integers(0, n))
    for points in (evenly_spaced(n, keep), grid_points(n, keep)):
        assert len(points) == keep
        assert points == sorted(set(points))
        assert all(0 <= point < n for point in points)
    gaps = np.diff(evenly_spaced(n, keep))
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_grid_is_two_dimensional():
    rows, columns = np.divmod(np.array(grid_points(576, 144)), 24)
    assert sorted(set(rows)) == sorted(set(columns)) == list(range(1, 24, 2))
    # No 6 x 6 window of a picture goes without, at a count that no lattice fits.
    picture = np.zeros(576, dtype=bool)
    picture[grid_points(576, 60)] = True
    windows = np.lib.stride_tricks.sliding_window_view(picture.reshape(24, 24), (6, 6))
    assert windows.any((2, 3)).all()


def test_uniform_gives_every_picture_its_share():
    image = torch.zeros(2, 40, dtype=torch.bool)
    image[0, 3:19] = True  # 4 x 4
    image[0, 22:38] = True  # 4 x 4
    image[1, 1:10] = True  # 3 x 3
    selection = select_tokens(Uniform(keep=8), DecoderInputs(image, torch.ones_like(image)), 0)
    first, second = kept_places(selection, image)
    square = [4 * row + column for row in (1, 3) for column in (1, 3)]
    assert first.tolist() == [3 + p for p in square] + [22 + p for p in square]
    assert len(second) == 8


def naive_raters(states, image, valid):
    tokens = np.flatnonzero(valid)
    pictures = np.flatnonzero(image)
    question = [t for t in tokens if len(pictures) and t > pictures[-1]]
    if not question:
        return {int(tokens[-1])}
    shares = []
    for picture in pictures:
        dots = np.array([states[picture] @ states[t] for t in question])
        shares.append(np.exp(dots - dots.max()) / np.exp(dots - dots.max()).sum())
    fit = np.mean(shares, axis=0)
    chosen = {int(t) for t, f in zip(question, fit, strict=True) if f > fit.mean()}
    return chosen or set(map(int, question))


def naive_cluster(tokens, clusters):
    n = len(tokens)
    distance = np.array([[np.linalg.norm(a - b) for b in tokens] for a in tokens])
    distance /= sqrt(tokens.shape[1])
    density = [np.exp(-np.mean(np.sort(distance[i])[:clusters] ** 2)) for i in range(n)]
    score = []
    for i in range(n):
        denser = [distance[i, j] for j in range(n) if density[j] > density[i]]
        score.append(density[i] * min(denser, default=distance.max()))
    centres = np.argsort(-np.array(score), kind="stable")[:clusters].tolist()
    members = [
        centres.index(i) if i in centres else int(np.argmin([distance[i, c] for c in centres]))
        for i in range(n)
    ]
    return centres, members


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, 25), st.data())
def test_cluster(seed, n, data):
    clusters = data.draw(st.integers(1, n))
    tokens = np.random.default_rng(seed).normal(size=(n, 5))
    centres, members = cluster(torch.from_numpy(tokens), clusters)
    assert (centres.tolist(), members.tolist()) == naive_cluster(tokens, clusters)


def test_cluster_of_identical_tokens():
    centres, members = cluster(torch.ones(5, 3), 2)
    assert centres.tolist() == [0, 1]
    assert members.tolist()[:2] == [0, 1]


@few
@given(seed=st.integers(0, 2**32 - 1), recycle=st.booleans(), positions=POSITIONS)
@example(seed=1, recycle=True, positions="contiguous")
@example(seed=1, recycle=True, positions="original")
@example(seed=2, recycle=False, positions="contiguous")
def test_sparsevlm(seed, recycle, positions):
    rng = np.random.default_rng(seed)
    inputs = random_inputs(rng)
    states = rng.normal(size=inputs.hidden_states.shape)
    keep = int(rng.integers(0, 12)), 1
    selector = SparseVLM(after=(1, 4), keep=keep, recycle=recycle, positions=positions)
    marks = mark_tokens(selector, torch.from_numpy(states), inputs.image, inputs.valid)
    inputs = DecoderInputs(**{**vars(inputs), "marks": marks})
    selection = select_tokens(selector, inputs, 2)
    for sample in range(3):
        weights, where = attention_of(inputs, sample)
        rating = naive_raters(
            states[sample], inputs.image[sample].numpy(), inputs.valid[sample].numpy()
        )
        assert set(marks[sample].nonzero().flatten().tolist()) == rating
        rows = [list(where).index(position) for position in rating]
        tokens = np.flatnonzero(inputs.image[sample].numpy()[where])
        scores = weights.mean(0)[rows].mean(0)[tokens]
        count = min(selector.keep[0], len(tokens))
        kept = best(scores, count)
        dropped = np.array([t for t in range(len(tokens)) if t not in kept], dtype=int)
        expected = {
            int(where[tokens[t]]): inputs.hidden_states[sample, where[tokens[t]]].numpy()
            for t in kept
        }
        if recycle and len(dropped):
            reused = int(len(dropped) * 0.3) + 1
            ranked = dropped[np.argsort(-scores[dropped], kind="stable")[:reused]]
            vectors = inputs.hidden_states[sample].numpy()[where[tokens[ranked]]]
            centres, members = naive_cluster(vectors, int(reused / 10) + 1)
            for number, centre in enumerate(centres):
                group = vectors[np.array(members) == number]
                expected[int(where[tokens[ranked[centre]]])] = group.mean(0)
        assert kept_places(selection, inputs.image)[sample].tolist() == sorted(expected)
        assert len(expected) == selector.counts(len(tokens))[0]
        if positions == "contiguous":
            merged = [place for place in expected if place not in where[tokens[kept]]]
            expected = behind_pictures(expected, merged, inputs.image[sample].numpy())
        states_after = selection.hidden_states if recycle else inputs.hidden_states
        for position, vector in expected.items():
            np.testing.assert_allclose(states_after[sample, position].numpy(), vector, atol=1e-12)


def behind_pictures(vectors, merged, image):
    """Vectors by place, with the `merged` ones behind all others of their run of image tokens."""
    moved = {}
    for begin in np.flatnonzero(image & ~np.r_[False, image[:-1]]):
        run = set(range(begin, begin + int(np.argmin(np.r_[image[begin:], False]))))
        slots = sorted(run & set(vectors))
        order = [place for place in slots if place not in merged]
        order += [place for place in merged if place in run]
        moved |= {slot: vectors[place] for slot, place in zip(slots, order, strict=True)}
    return moved


def test_sparsevlm_counts_of_the_paper():
    assert SparseVLM(recycle=False).counts(576) == (300, 200, 110)
    assert SparseVLM().counts(576) == (309, 204, 113)
    assert SparseVLM().layers == (3, 7, 16)


def test_raters_fall_back_to_the_last_token_without_a_question():
    image = torch.tensor([[False, True, True], [False, False, False]])
    marks = mark_tokens(SparseVLM(), torch.randn(2, 3, 4), image, torch.ones(2, 3).bool())
    assert marks.tolist() == [[False, False, True], [False, False, True]]


@pytest.mark.parametrize("kind", [FastV, Random, Uniform, SparseVLM, DivPrune])
def test_at_keeps_exactly_what_a_plan_says(kind):
    for of in (576, 577, 49, 1):
        for keep in range(of + 1):
            selector = kind.at(2, keep, of)
            assert selector.layers == (2,)
            assert selector.counts(of) == (keep,)
